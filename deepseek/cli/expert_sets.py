"""`deepseek expert diff`, `deepseek expert lock` and `deepseek expert merge`."""

from pathlib import Path
from typing import Annotated

import typer

from deepseek.cli.options import Device, Key, Precision, existing_folder, names
from deepseek.cli.output import echo
from deepseek.errors import PackError

BASE = "smollm2-135m"
"""Base of all experts that are locked unless --base says otherwise."""

Pack = Annotated[str, typer.Argument(help="A pack file, or the name of a trained expert.")]


def diff(first: Pack, second: Pack) -> None:
    """Print what two packs differ in: fields of their manifests, and weights.

    Exits with 1 if they differ, as `diff` does.
    """
    from deepseek.packs.difference import difference
    from deepseek.packs.library import find_pack
    from deepseek.packs.pack import read_pack

    changes = difference(read_pack(find_pack(first)), read_pack(find_pack(second)))
    for name, (before, after) in changes.fields.items():
        echo(f"{name}: {before} -> {after}")
    for tensor in changes.tensors:
        if tensor.relative is None:
            echo(f"{tensor.name}: only in one of them, or of another shape")
        else:
            echo(f"{tensor.name}: changed by {tensor.relative:.1%}, cosine {tensor.cosine:.4f}")
    echo(f"{changes.equal_tensors} tensors are equal, {len(changes.tensors)} differ", error=True)
    if changes.fields or changes.tensors:
        raise typer.Exit(1)


def lock(
    experts: Annotated[
        str, typer.Option(help="Experts to lock: names, comma-separated; 'all': every one.")
    ] = "all",
    base: Annotated[
        str | None,
        typer.Option(
            help=f"Base model of the experts; default: that of the named ones, with 'all' {BASE}."
        ),
    ] = None,
    experts_folder: Annotated[
        Path | None, typer.Option(help="Folder of the packs; default: that of trained experts.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("deepseek.lock"),
    key: Key = None,
) -> None:
    """Write the digests of a set of experts, for `deepseek serve --lock`."""
    from deepseek.checkpoint.files import writable_file
    from deepseek.packs.library import experts_folder as usual_folder
    from deepseek.packs.library import find_pack, packs_for
    from deepseek.packs.lock import lock_packs, write_lock
    from deepseek.packs.signature import load_key

    existing_folder("--experts-folder", experts_folder)
    writable_file(out)
    if experts.strip() == "all":
        model = base or BASE
        packs, problems = packs_for(model, experts_folder)
        for problem in problems:
            echo(f"warning: {problem}", error=True)
        paths = [*packs.values()]
        if not paths:
            raise PackError(
                f"There is no expert for the base {model} in {experts_folder or usual_folder()}; "
                "give --base the base of the others, or train one."
            )
    else:
        if not names(experts):
            raise PackError(f"--experts {experts!r} names no expert; give names, or all.")
        folder = experts_folder
        paths = [
            find_pack(folder / f"{name}.safetensors" if folder else name) for name in names(experts)
        ]
    locked = write_lock(out, lock_packs(paths, base), load_key(key) if key else None)
    echo(f"{out}: {', '.join(expert.name for expert in locked.experts)}; {locked.digest[:16]}")


def merge(
    first: Annotated[str, typer.Argument(help="Name of a trained expert.")],
    second: Annotated[str, typer.Argument(help="Name of another one of the same base.")],
    out: Annotated[str, typer.Option(help="Name of the merged expert.")],
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Width of its expert layers; default: that of both together."),
    ] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
) -> None:
    """Make one expert that does what two do, and say what it does for both held-out texts.

    Their run folders must still be there, as it is fitted to their text.
    """
    from deepseek.train.jobs.merge import merge_experts

    merged = merge_experts(first, second, out, width, quiet=False, device=device, dtype=dtype)
    echo(str(merged.pack))
    for line in merged.report():
        echo(line)
