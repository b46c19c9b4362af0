"""Atomic writes: after a crash, a file is either complete or absent.

Every writer fills a temporary file beside the target, flushes it to disk and renames it. A training
state is a folder `step-00001200/` with `state.safetensors` and `meta.json`. The latter contains a
digest over both, so that a damaged state is detected and training can resume from an older one.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from deepseek.checkpoint.permissions import open_to_readers, settle_permissions
from deepseek.checkpoint.rename import exchange, rename_to_new
from deepseek.errors import CheckpointError, ConfigError, TrainError

if TYPE_CHECKING:
    from torch import Tensor

STATE_NAME = re.compile(r"step-\d{8,}")

RUN_STARTED = "start.json"
"""File in a run folder: the first request, and digests of the inputs."""


def home() -> Path:
    """Return the folder for downloaded models and caches.

    It is `$DEEPSEEK_HOME` if that is set, else `~/.cache/deepseek`. No shell replaces the `~` of a
    variable that a file of settings sets.

    Raises:
        ConfigError: `$DEEPSEEK_HOME` begins with the `~` of a user who does not exist.
    """
    folder = os.environ.get("DEEPSEEK_HOME") or "~/.cache/deepseek"
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"DEEPSEEK_HOME is {folder!r}, but the home of that user is unknown; set it to a full "
            "path."
        ) from None


def is_ours(folder: Path) -> bool:
    """Return whether a folder is the library's home or a run folder, whose metrics and held-out
    questions with answers must not be trained on.
    """
    start_file = folder / RUN_STARTED
    try:
        if start_file.is_file():
            return read_object(start_file).keys() >= {"inputs", "request"}
    except (CheckpointError, PermissionError):  # the latter: the folder may not be entered
        return False
    return folder.resolve() == home().resolve()


@contextmanager
def atomic_write(path: str | Path, *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, or beside what `path` links to.

    The temporary file replaces `path` when the block succeeds, and is deleted when it fails. A link
    stays, and the file that it leads to is replaced. A replaced file's permissions stay.

    Args:
        path: the file to write.
        new: whether to refuse, rather than replace, what somebody put at `path` meanwhile.

    Raises:
        ConfigError: `new`, and something is at `path`.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        settle_permissions(temporary, path)
        _sync(temporary)
        if new:
            _install_new(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path, *, new: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, or beside what `path` links to.

    The temporary folder replaces `path` when the block succeeds, and is deleted when it fails. The
    block may create files in it, but no folders. A link stays, and the folder that it leads to is
    replaced. `new` is that of `atomic_write`.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        install(temporary, path, new=new)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes left beside `path` while they wrote it.

    Args:
        path: the file or folder. No other process may be writing it: the caller holds its lock.
    """
    leftover_name = re.compile(
        rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp"
    )  # see temporary_path
    siblings = list(path.parent.iterdir()) if path.parent.is_dir() else []
    for sibling in siblings:
        if not leftover_name.fullmatch(sibling.name):
            continue
        if sibling.is_dir():
            shutil.rmtree(sibling, ignore_errors=True)
        else:
            sibling.unlink(missing_ok=True)


def install(temporary: Path, path: Path, *, new: bool = False) -> None:
    """Flush a folder of files to disk and rename it to `path`.

    An existing folder is replaced, unless `new`: see `atomic_write`.
    """
    for file in list(temporary.iterdir()):
        open_to_readers(file)
        _sync(file)
    _sync(temporary)
    if new:
        _install_new(temporary, path)
    elif exchange(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        _replace_folder(temporary, path)
    _sync(path.parent)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Rename a folder to `path`, moving away what is there first."""
    while temporary.exists():
        old_folder = temporary_path(path)
        with suppress(FileNotFoundError):
            path.replace(old_folder)
        try:
            temporary.replace(path)
        except OSError as error:
            # Another process may have put its folder there meanwhile.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                with suppress(OSError):
                    old_folder.replace(path)
                raise
        shutil.rmtree(old_folder, ignore_errors=True)


def _install_new(temporary: Path, path: Path) -> None:
    """Rename a file or folder to `path`, where nothing may be."""
    try:
        rename_to_new(temporary, path)
    except FileExistsError:
        raise ConfigError(
            f"{path} was put there by somebody else meanwhile; it stays as it is, and nothing was "
            "written: choose another path, or move it away and run this again."
        ) from None


@contextmanager
def disk_full_explained(message: str) -> Iterator[None]:
    """Raise a `TrainError` with this message if the disk is full within the block."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise TrainError(message) from error


def canonical_json(value: object) -> bytes:
    """Return the canonical JSON of a value, sorted keys and no spaces, for digests.

    Half of a surrogate pair, as in a path that is not UTF-8, is written as its escape.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="backslashreplace")


def write_json(path: str | Path, value: object) -> None:
    """Write a value as indented JSON, atomically; `canonical_json` says what is escaped."""
    with atomic_write(path) as temporary:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: str | Path) -> Any:
    """Return the value of a JSON file; raise `CheckpointError` if it cannot be read.

    A pipe or a device is refused without being opened, which could wait forever.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}); restore it or delete it."
        ) from error


def read_object(path: str | Path) -> dict[str, Any]:
    """Return the value of a JSON file that holds an object.

    Raises:
        CheckpointError: the file cannot be read, or holds another kind of value.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__} and no JSON object; restore it or delete it."
        )
    return value


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_state(folder: str | Path, tensors: dict[str, "Tensor"], meta: dict[str, Any]) -> None:
    """Write a training state atomically.

    Args:
        folder: folder to write.
        tensors: tensors by name.
        meta: JSON values.
    """
    from safetensors.torch import save_file

    with atomic_folder(folder) as temporary:
        state = temporary / "state.safetensors"
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, state
        )
        write_json(
            temporary / "meta.json", {"meta": meta, "digest": _state_digest(temporary, meta)}
        )


def load_state(folder: str | Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Return the tensors (on the CPU) and meta of a state folder.

    Raises:
        CheckpointError: the folder is damaged.
    """
    from safetensors.torch import load_file

    meta = state_meta(Path(folder))
    return load_file(Path(folder) / "state.safetensors"), meta


def seal_state(temporary: Path, folder: Path, meta: dict[str, Any]) -> None:
    """Complete a state that several processes have written: add the meta and rename the folder.

    Args:
        temporary: hidden folder with the safetensors files.
        folder: final name of the folder.
        meta: JSON values.
    """
    write_json(temporary / "meta.json", {"meta": meta, "digest": _state_digest(temporary, meta)})
    install(temporary, folder)


def state_meta(folder: Path) -> dict[str, Any]:
    """Return the meta of a state folder; raise `CheckpointError` if it is damaged."""
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds no safetensors; delete the folder and resume from an older state."
        )
    record = read_json(folder / "meta.json")
    if not isinstance(record, dict) or not isinstance(record.get("meta"), dict):
        raise CheckpointError(
            f"{folder}/meta.json is not a state record; delete the folder and resume."
        )
    if record.get("digest") != _state_digest(folder, record["meta"]):
        raise CheckpointError(
            f"{folder} is damaged (its digest differs); delete it and resume from an older state."
        )
    meta: dict[str, Any] = record["meta"]
    return meta


def latest_state(root: str | Path) -> Path | None:
    """Return the newest undamaged state folder under `root`, or None."""
    for folder in _states(Path(root)):
        try:
            state_meta(folder)
        except CheckpointError:
            continue
        return folder
    return None


def prune(root: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` state folders under `root`, and unfinished writes."""
    for folder in _states(Path(root))[keep:]:
        shutil.rmtree(folder)
    _remove_unfinished(root)


def prune_before(root: str | Path, step: int) -> None:
    """Delete the state folders under `root` that are older than the newest one before `step`, and
    unfinished writes.
    """
    older_folders = [folder for folder in _states(Path(root)) if _step(folder) < step]
    for folder in older_folders[1:]:
        shutil.rmtree(folder)
    _remove_unfinished(root)


def prune_after(root: str | Path, step: int) -> None:
    """Delete the state folders under `root` that are newer than `step`."""
    for folder in _states(Path(root)):
        if _step(folder) > step:
            shutil.rmtree(folder)


def _remove_unfinished(root: str | Path) -> None:
    """Delete what processes left that were killed while writing a state folder."""
    for leftover in Path(root).glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def oldest_step(root: str | Path) -> int:
    """Return the step of the oldest state folder under `root`, 0 if there is none."""
    folders = _states(Path(root))
    return _step(folders[-1]) if folders else 0


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _states(root: Path) -> list[Path]:
    """Return the state folders under `root`, newest first."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted(
        (f for f in folders if STATE_NAME.fullmatch(f.name) and f.is_dir()), key=_step, reverse=True
    )


def _state_digest(folder: Path, meta: dict[str, Any]) -> str:
    """Return the digest over the tensors and the meta of a state folder."""
    files = "".join(file_digest(file) for file in sorted(folder.glob("*.safetensors")))
    return hashlib.sha256(files.encode() + canonical_json(meta)).hexdigest()


def temporary_path(path: Path) -> Path:
    """Return an unused hidden name beside `path`.

    It is on the same file system, so that renaming it to `path` is atomic.
    """
    return path.with_name(f".{path.name}.{token_hex(4)}.tmp")


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_disk_full(error: Exception) -> bool:
    """Return whether the error means a full disk; safetensors and numpy tell by message only."""
    number = getattr(error, "errno", None)
    signs = ("No space left", "os error 28", "requested and")
    return number in (errno.ENOSPC, errno.EDQUOT) or any(sign in str(error) for sign in signs)
