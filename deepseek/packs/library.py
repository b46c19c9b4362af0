"""The folder of trained experts: where `expert train` puts packs and where names are looked up."""

from pathlib import Path

from deepseek.checkpoint.store import home
from deepseek.errors import PackError
from deepseek.packs.pack import read_pack
from deepseek.registry import nearest

SUFFIX = ".safetensors"


def experts_folder() -> Path:
    """Return the folder of this user's trained experts (it may not exist yet)."""
    return home() / "experts"


def index_folder(name: str, folder: Path | None = None) -> Path:
    """Return where the retrieval index of an expert lies: beside its pack, in `folder` or that of
    trained experts.
    """
    return (folder or experts_folder()) / f"{name}.index"


def installed(folder: Path | None = None) -> dict[str, Path]:
    """Return the packs in `folder`, or in that of trained experts, name to file, sorted by name."""
    return {path.stem: path for path in sorted((folder or experts_folder()).glob(f"*{SUFFIX}"))}


def packs_for(base: str, folder: Path | None = None) -> tuple[dict[str, Path], list[str]]:
    """Return the packs in a folder that were trained beside `base`, name to file, and what is wrong
    with unusable ones.

    Args:
        base: name of the base model.
        folder: None takes that of trained experts.
    """
    fitting: dict[str, Path] = {}
    problems: list[str] = []
    for name, path in installed(folder).items():
        try:
            manifest = read_pack(path).manifest
        except (PackError, OSError) as error:
            problems.append(f"{path.name} is left out: {error}")
            continue
        if manifest.base.name == base:
            fitting[name] = path
    return fitting, problems


def find_pack(name_or_path: str | Path) -> Path:
    """Return the file of an expert given by path or by the name of a trained one.

    Raises:
        PackError: neither a file nor a known name.
    """
    path = Path(name_or_path)
    if path.suffix == SUFFIX or len(path.parts) > 1:
        if path.is_file():
            return path
        raise PackError(
            f"There is no expert pack at {path}; give the path of a {SUFFIX} file or a trained expert's name."
        )
    known = installed()
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    hint = (
        nearest(str(name_or_path), known)
        if known
        else "none is trained yet, see `deepseek expert train --help`"
    )
    raise PackError(f"There is no expert named {str(name_or_path)!r}; {hint}.")
