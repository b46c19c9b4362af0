"""The library of trained experts: the folder where `expert train` writes packs, and look-ups."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek import checks
from deepseek.checkpoint.files import expanded
from deepseek.checkpoint.store import home
from deepseek.errors import CheckpointError, ConfigError, PackError
from deepseek.registry import nearest

if TYPE_CHECKING:
    from deepseek.checkpoint.fingerprint import Fingerprint
    from deepseek.checkpoint.wheels import Progress
    from deepseek.packs.manifest import PackManifest

SUFFIX = ".safetensors"


def experts_folder() -> Path:
    """Return the folder of this user's trained experts, which may not exist yet."""
    return home() / "experts"


def index_folder(name: str, folder: Path | None = None) -> Path:
    """Return the path of an expert's retrieval index, which is stored beside its pack.

    Args:
        name: name of the expert.
        folder: folder of the pack; None: the folder of trained experts.
    """
    return (folder or experts_folder()) / f"{name}.index"


def prompts_file(name: str, folder: Path | None = None) -> Path:
    """Return the path of the prompts that show what an expert knows, beside its pack.

    Args:
        name: name of the expert.
        folder: folder of the pack; None: the folder of trained experts.
    """
    return (folder or experts_folder()) / f"{name}.prompts.json"


def installed(folder: Path | None = None) -> dict[str, Path]:
    """Return the packs in a folder as name -> file, sorted by name.

    Args:
        folder: the folder; None: that of trained experts.
    """
    return {path.stem: path for path in sorted((folder or experts_folder()).glob(f"*{SUFFIX}"))}


def check_free(name: str) -> None:
    """Check that nothing in the home belongs to an expert of a name.

    A run of that name would replace a new pack when it is resumed, and its held-out text, its index
    and its prompts would be taken for those of the new expert.

    Args:
        name: the name that a new expert is to have.

    Raises:
        ConfigError: there is a pack, a run, a retrieval index or a file of prompts of that name.
    """
    pack = installed().get(name)
    if pack is not None:
        raise ConfigError(f"{pack} exists already; choose another name.")
    for path in (home() / "runs" / name, index_folder(name), prompts_file(name)):
        if path.exists():
            raise ConfigError(
                f"{path} exists already and would be taken for that of the new expert {name}; "
                "choose another name, or delete it."
            )


def packs_for(
    base: str, folder: Path | None = None, progress: "Progress | None" = None
) -> tuple[dict[str, Path], list[str]]:
    """Return the packs in a folder that were trained for a base model.

    Packs are matched by the digests of the base, as a name does not identify a model: a hub id or
    GGUF file is stored under another name, and two folders may have the same last part. Of several
    packs of one expert, the file of that name counts, else the first one.

    Args:
        base: a known name, a folder, a GGUF file or a hub id; fetched if a pack can be read.
        folder: the folder; None: that of trained experts.
        progress: callback for fetching the base; None: no reports.

    Returns:
        The packs as name -> file, and one message per file that cannot be used, among them those
        that were made for another base of the same name.

    Raises:
        CheckpointError: the base is not a model.
        HubError: the base cannot be fetched.
    """
    from deepseek.packs.pack import read_pack  # loads torch

    manifests: dict[str, PackManifest] = {}  # by file, without its suffix
    problems: list[str] = []
    packs = installed(folder)
    for file, path in packs.items():
        try:
            manifests[file] = read_pack(path).manifest
        except (PackError, OSError) as error:
            problems.append(f"{path.name} is left out: {error}")
    experts, base_problems = _of_base(manifests, base, progress)
    problems += base_problems
    files_by_name: dict[str, str] = {}  # name -> file
    for file in sorted(experts, key=lambda file: file != experts[file]):
        files_by_name.setdefault(experts[file], file)
    for file, name in experts.items():
        if files_by_name[name] != file:
            problems.append(
                f"{file}{SUFFIX} is left out: {files_by_name[name]}{SUFFIX} holds an expert named "
                f"{name} too; move one of them elsewhere."
            )
    return {file: packs[file] for file in experts if files_by_name[experts[file]] == file}, problems


def _of_base(
    manifests: "dict[str, PackManifest]", base: str, progress: "Progress | None"
) -> tuple[dict[str, str], list[str]]:
    """Return the names of the experts that belong to a base, by file, and one message per file that
    was made for another base of the same name.
    """
    from deepseek.checkpoint.fingerprint import fingerprint
    from deepseek.checkpoint.hub import resolve
    from deepseek.checkpoint.models import model_name

    if not manifests:
        return {}, []  # without packs, the base need not be fetched
    base_folder = resolve(base, progress)
    digests = None
    if _has_shape_of_one(base_folder, manifests.values()):
        if progress is not None:
            progress(0, 0, "checking the base")
        digests = fingerprint(base_folder)  # reads all weights of a base that is new here
    experts: dict[str, str] = {}
    problems: list[str] = []
    for file, manifest in manifests.items():
        if digests is not None and is_made_for(manifest, digests):
            experts[file] = manifest.name
        elif manifest.base.name in (model_name(base), model_name(base_folder)):
            problems.append(
                f"{file}{SUFFIX} is left out: it was made for another base of the name "
                f"{manifest.base.name}; load that base, or train the expert on this one."
            )
    return experts, problems


def _has_shape_of_one(folder: Path, manifests: "Iterable[PackManifest]") -> bool:
    """Return whether a model has the shape of one of these packs' bases; True if its config does
    not state it.
    """
    from deepseek.packs.manifest import shape_of

    try:
        shape = shape_of(folder)
    except CheckpointError:
        return True
    return any(
        shape == (manifest.base.hidden_size, manifest.base.num_layers) for manifest in manifests
    )


def is_made_for(manifest: "PackManifest", digests: "Fingerprint") -> bool:
    """Return whether a pack was made for the base model with these digests."""
    base = manifest.base
    return (base.weights, base.tokenizer) == (digests.weights, digests.tokenizer)


def find_pack(name_or_path: str | Path, folder: Path | None = None) -> Path:
    """Return the pack file of an expert.

    Args:
        name_or_path: path of a pack file, or the name of a trained expert.
        folder: folder in which names are looked up; None: the folder of trained experts.

    Raises:
        ConfigError: this is neither a path nor a name.
        PackError: there is no such file or expert.
    """
    path = checks.path("expert", name_or_path)
    if path.suffix == SUFFIX or len(path.parts) > 1:
        path = expanded(path)
        if path.is_file():
            return path
        raise PackError(
            f"There is no expert pack at {path}; give the path of a {SUFFIX} file or a trained "
            "expert's name."
        )
    packs = installed(folder)
    if str(name_or_path) in packs:
        return packs[str(name_or_path)]
    folder_note = f" in {folder}" if folder else ""
    if packs:
        hint = nearest(str(name_or_path), packs)
    elif folder:
        hint = "there is none at all"
    else:
        hint = "none is trained yet, see `deepseek expert train --help`"
    raise PackError(f"There is no expert named {str(name_or_path)!r}{folder_note}; {hint}.")
