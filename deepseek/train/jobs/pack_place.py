"""Find the pack that an expert's run wrote, even if the library's home was copied or moved."""

from pathlib import Path

from deepseek.checkpoint.files import located
from deepseek.checkpoint.store import home, read_object
from deepseek.errors import ConfigError
from deepseek.packs.library import SUFFIX, experts_folder


def pack_of(run: Path) -> Path | None:
    """Return the path of the pack that a run wrote; None: it has written none yet.

    A run records an absolute path, which is stale if the home was copied or moved since. So a path
    in the home's folder of experts is replaced by the one in the present home; any other, chosen
    with `--out`, is kept.

    Args:
        run: the run folder.
    """
    result = run / "result.json"
    noted = str(read_object(result).get("pack", "")) if result.is_file() else ""
    if not noted:
        return None
    pack = Path(noted)
    is_ours = located(run).parent == located(home() / "runs")
    return experts_folder() / pack.name if is_ours and _is_usual(pack) else pack


def refuse_other_place(run: Path, asked: Path) -> None:
    """Check that a finished run is not asked for its pack at another path while it has one.

    Otherwise the run would write the pack of its first training there, without the updates, and
    record it as its own.

    Args:
        run: the run folder, which need not exist.
        asked: path of the pack that is asked for.

    Raises:
        ConfigError: its pack is elsewhere.
    """
    pack = pack_of(run)
    if pack is not None and pack.is_file() and located(pack) != asked:
        raise ConfigError(
            f"{run} has its expert in {pack}; copy that file to {asked}, or give another --name."
        )


def _is_usual(pack: Path) -> bool:
    """Return whether the path of a pack is, or was, in a home's folder of trained experts.

    Such a folder has a run of the pack's name beside it; a folder `experts` chosen with `--out` has
    none. A path without a file counts as one of a former home.
    """
    if pack.parent.name != experts_folder().name or pack.suffix != SUFFIX:
        return False
    return (pack.parent.parent / "runs" / pack.stem).is_dir() or not pack.is_file()
