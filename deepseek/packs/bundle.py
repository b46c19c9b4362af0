"""A set of experts as one file: a tar archive of its lock and of its packs.

The lock comes first, so that a signature covers the digests of all packs before any is read.
"""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deepseek.checkpoint.files import is_special
from deepseek.checkpoint.output import new_file, no_room
from deepseek.checkpoint.store import atomic_write, disk_full_explained, home
from deepseek.errors import PackError
from deepseek.packs.archive import BLOCK, is_archive, open_archive, write_archive
from deepseek.packs.library import SUFFIX, experts_folder, index_folder
from deepseek.packs.lock import LOCK_FILE, Lock, LockedExpert, read_lock, write_lock
from deepseek.packs.pack import read_pack


@dataclass(frozen=True)
class Installation:
    """What `install_bundle` did.

    Attributes:
        lock: the lock of the set.
        written: names of the experts whose packs were written; the others were there already.
    """

    lock: Lock
    written: tuple[str, ...]


def write_bundle(
    path: Path, lock: Lock, packs: Sequence[Path], key: Ed25519PrivateKey | None = None
) -> Lock:
    """Write a set of experts into one new file, and return its lock as written.

    Args:
        path: the file; nothing may be there.
        lock: the lock of `packs`.
        packs: the pack files.
        key: private key to sign the set with; None: leave it unsigned.

    Raises:
        ConfigError: something is at `path`, or nothing can be written there.
        PackError: a pack is no longer the one that the lock states.
        TrainError: the disk is full.
    """
    sources = {pack.stem: pack for pack in packs}
    with new_file(path) as temporary, tempfile.TemporaryDirectory() as folder:
        lock_file = Path(folder) / LOCK_FILE
        lock = write_lock(lock_file, lock, key)
        in_order = {_file_of(expert): sources[expert.name] for expert in lock.experts}
        write_archive(temporary, {LOCK_FILE: lock_file, **in_order})
        for expert in lock.experts:  # an update may have replaced one meanwhile
            _check_pack(expert, sources[expert.name], lock, "bundle the set again")
    return lock


def install_bundle(
    path: Path, folder: Path | None = None, *, trusted: bool = False, replace: bool = False
) -> Installation:
    """Put the packs of a bundle into a folder, all or none of them.

    Each pack is checked against the lock before the first one gets its name. If the process is
    killed while they get their names, the same call completes the set. A retrieval index beside a
    replaced pack is removed, since its passages are of that pack's text.

    Args:
        path: the bundle.
        folder: folder of the packs; None: that of trained experts.
        trusted: whether the set must be signed by a key in the trust folder.
        replace: whether to replace other packs under the same names.

    Raises:
        ConfigError: somebody else put a pack into the folder while those of the bundle got their
            names; the same call completes the set once that pack is gone.
        PackError: the bundle cannot be read, is damaged or not signed as required; or another pack
            or its index has the name of one of the experts, or one was trained in this home.
        TrainError: the disk is full.
    """
    _check_archive(path)
    lock = read_lock(path, trusted)
    target_folder = folder or experts_folder()
    missing = [
        expert
        for expert in lock.experts
        if not _has_pack(expert, target_folder / _file_of(expert), replace)
    ]
    indexes = [index_folder(expert.name, target_folder) for expert in missing]
    if folder is None:
        for expert in missing:
            _check_untrained(expert.name)
    if not replace:
        _check_no_index(indexes)
    with (
        disk_full_explained(no_room(target_folder)),
        open_archive(path) as archive,
        ExitStack() as renames,
    ):
        archive.next_file(LOCK_FILE)
        for expert in lock.experts:
            content, _ = archive.next_file(_file_of(expert))
            if expert not in missing:
                continue
            target = target_folder / _file_of(expert)
            temporary = renames.enter_context(atomic_write(target, new=not replace))
            with open(temporary, "wb") as file:
                shutil.copyfileobj(content, file, BLOCK)
            _check_pack(expert, temporary, lock, f"get {path} again")
        archive.end()
        for index in indexes:
            shutil.rmtree(index, ignore_errors=True)
        _check_no_index(indexes)
    return Installation(lock, tuple(expert.name for expert in missing))


def _check_archive(path: Path) -> None:
    """Check that a file is a bundle, as `read_lock` accepts a lock file as well.

    Raises:
        PackError: it is not.
    """
    if path.is_dir():
        raise PackError(f"{path} is a folder; give the file that `expert bundle` wrote.")
    try:
        is_bundle = not is_special(path) and is_archive(path)
    except OSError as error:
        raise PackError(f"The bundle {path} cannot be read ({error.strerror}).") from None
    if not is_bundle:
        raise PackError(f"{path} is not a bundle; give a file of `deepseek expert bundle`.")


def _file_of(expert: LockedExpert) -> str:
    """Return the file name of an expert's pack."""
    return f"{expert.name}{SUFFIX}"


def _has_pack(expert: LockedExpert, path: Path, replace: bool) -> bool:
    """Return whether a path holds the pack of an expert.

    Raises:
        PackError: another pack is at its path, and is not to be replaced.
    """
    if not path.exists():
        return False
    try:
        digest = read_pack(path).manifest.digest
    except PackError:
        digest = "unreadable"
    if digest != expert.digest and not replace:
        raise PackError(
            f"{path} is another pack of that name ({digest[:16]}, in the bundle "
            f"{expert.digest[:16]}); replace it with --replace, or install into another folder."
        )
    return digest == expert.digest


def _check_untrained(name: str) -> None:
    """Check that no expert of a name was trained in this home.

    Its run would take the installed pack for its own: the next update would replace it, and
    evaluations would use text that the pack was not trained on.

    Raises:
        PackError: one was.
    """
    run = home() / "runs" / name
    if run.exists():
        raise PackError(
            f"An expert {name} was trained here ({run}); rename it with `deepseek expert rename`, "
            "or install into another folder."
        )


def _check_no_index(indexes: Sequence[Path]) -> None:
    """Check that no retrieval index is left, which would be taken for that of a new pack.

    Raises:
        PackError: one is.
    """
    for index in indexes:
        if index.exists():
            raise PackError(
                f"{index} is the index of another pack of that name; delete it, remove it with "
                "--replace, or install into another folder."
            )


def _check_pack(expert: LockedExpert, path: Path, lock: Lock, advice: str) -> None:
    """Check that a file holds the pack that a lock states for an expert.

    Raises:
        PackError: it cannot be read, or holds another pack.
    """
    manifest = read_pack(path).manifest
    stated = (expert.name, expert.digest, lock.base)
    if (manifest.name, manifest.digest, manifest.base.weights) != stated:
        raise PackError(
            f"The pack of {expert.name} has the digest {manifest.digest[:16]}, and the lock states "
            f"{expert.digest[:16]}; {advice}."
        )
