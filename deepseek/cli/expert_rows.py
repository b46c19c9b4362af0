"""Rows of `deepseek expert list`."""

from pathlib import Path

from deepseek.cli.shapes import ExpertRow, Loss
from deepseek.cli.units import size
from deepseek.errors import PackError
from deepseek.packs.listing import read_manifest
from deepseek.packs.lora import LoraManifest


def expert_row(name: str, path: Path) -> ExpertRow:
    """Return what a list says of a pack file.

    Args:
        name: name of the expert, which is that of the file.
        path: the file, which may be damaged.
    """
    num_bytes = path.lstat().st_size
    try:
        manifest = read_manifest(path)
    except (PackError, OSError) as error:
        return ExpertRow(name=name, path=str(path), bytes=num_bytes, problem=str(error))
    losses = {
        text: Loss(before=metric.before, after=metric.after)
        for text, metric in manifest.metrics.items()
    }
    return ExpertRow(
        name=name,
        path=str(path),
        bytes=num_bytes,
        kind="lora" if isinstance(manifest, LoraManifest) else "module",
        base=manifest.base.name,
        layers=list(manifest.layers),
        domain=manifest.domain,
        licence=manifest.licence,
        verdict=manifest.verdict,
        armed_by_auto=manifest.helps,
        signer=manifest.signature.public_key if manifest.signature else None,
        metrics=losses,
    )


def expert_line(row: ExpertRow) -> str:
    """Return the line of a list."""
    losses = [
        f"{text} {metric.before:.3f} -> {metric.after:.3f}" for text, metric in row.metrics.items()
    ]
    details = [f"{len(row.layers)} layers", row.verdict, *losses, row.domain]
    outcome = row.problem or "  ".join(details).rstrip()
    return f"{row.name:24}  {size(row.bytes):>9}  {outcome}"
