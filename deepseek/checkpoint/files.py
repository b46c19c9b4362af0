"""Checks of paths that a user names, made before anything is read or written.

They say in one sentence what is wrong with a path, and never wait: a named pipe or a device is
refused without being opened.
"""

import os
import stat
import tempfile
from pathlib import Path

from deepseek.checkpoint.store import temporary_path
from deepseek.errors import ConfigError, DataError, UserError

LONGEST_NAME = 255
"""Maximum bytes of one part of a path, as on all file systems in use."""

DEVICES = Path("/dev")
"""Folder of the devices, where a file that replaced one would break other programs."""

MEMORY = DEVICES / "shm"
"""File system in memory, the one place below `DEVICES` for files."""


def expanded(path: str | Path, error: type[UserError] = ConfigError) -> Path:
    """Return a path with `~` replaced; it stays relative, and links are not followed.

    Args:
        path: the path.
        error: class of the error to raise.

    Raises:
        UserError: (of class `error`) there is no such user, or the path is impossible.
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError) as cause:
        raise error(f"{path} is no possible path ({cause}); check it.") from None


def located(path: str | Path) -> Path:
    """Return an absolute path, with `~` and links resolved as far as they exist.

    Raises:
        ConfigError: there is no such user, the links form a loop, or the path is impossible.
    """
    try:
        return expanded(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{path} is no possible path ({error}); check it.") from None


def stored_model_name(name: str) -> str:
    """Return a model's name as a run stores it: the absolute path of a local folder or GGUF file,
    so that it means the same from any working folder; other names unchanged.

    Links are not followed, as one may be set to a newer model on purpose.

    Args:
        name: a known name, the name of a model trained here, a folder, a GGUF file or a hub id.
    """
    from deepseek.checkpoint.wheels import KNOWN

    if name in KNOWN:  # a folder of that name does not hide the model (see `hub.resolve`)
        return name
    try:
        path = Path(name).expanduser()
        is_local = path.is_dir() or path.is_file()
        return os.path.normpath(path.absolute()) if is_local else name
    except (OSError, RuntimeError, ValueError):  # no such user, or an impossible path
        return name


def readable_file(
    path: str | Path,
    replacement: str,
    error: type[UserError] = DataError,
    most_bytes: int | None = None,
) -> Path:
    """Return a path that is a readable regular file, with `~` replaced.

    Args:
        path: path of the file; links are followed.
        replacement: what to give instead, for the error message, such as "one JSONL file".
        error: class of the error to raise.
        most_bytes: size of the largest file to accept; None: any.

    Raises:
        UserError: (of class `error`) there is no such file, it is a folder, a pipe or a device, it
            is too large, or it cannot be read.
    """
    file = expanded(path, error)
    cause = _unreadable(file, most_bytes)
    if cause:
        raise error(f"{file} {cause}; give {replacement}.")
    return file


def existing_path(path: str | Path) -> Path:
    """Return a path that is a readable file or folder, with `~` replaced.

    Raises:
        DataError: it is neither.
    """
    place = expanded(path, DataError)
    cause = None if _is_folder(place) else _unreadable(place, None)
    if cause:
        raise DataError(f"{place} {cause}; check the path.")
    return place


def writable_file(path: str | Path) -> Path:
    """Return a path where a file can be written, with `~` replaced, without leaving a trace there.

    Raises:
        ConfigError: it is a folder, a device or a pipe, its name is impossible, or its folder
            cannot be written to.
    """
    file = expanded(path)
    cause = _unwritable(file)
    if not cause and file.is_dir():
        cause = "is a folder"
    elif not cause and (_is_device_path(file) or (file.exists() and not file.is_file())):
        cause = "is a device or a pipe"
    if cause:
        raise ConfigError(f"{file} cannot be written, it {cause}; choose another path.")
    return file


def new_path(path: str | Path) -> Path:
    """Return a path where a new file or folder can be written, with `~` replaced, without leaving
    a trace there.

    Raises:
        ConfigError: something is there already, the path is impossible, or its folder cannot be
            written to.
    """
    place = expanded(path)
    cause = _unwritable(place)
    if cause:
        raise ConfigError(f"{place} cannot be written, it {cause}; choose another path.")
    if os.path.lexists(place):
        raise ConfigError(f"{place} exists already; choose another path or delete it.")
    return place


def writable_folder(path: str | Path, mark: str | None = None) -> Path:
    """Return a path where a folder can be written, with `~` replaced, without leaving a trace
    there.

    Args:
        path: the folder, which need not exist.
        mark: name of a file, such as `config.json`, that marks a folder as replaceable: any other
            folder that is not empty is refused. None: the folder is added to, not replaced.

    Raises:
        ConfigError: the path is a file, holds something else, or cannot be written to.
    """
    folder = expanded(path)
    cause = _unwritable(folder)
    if not cause and os.path.lexists(folder):
        if not folder.is_dir():
            cause = "is not a folder"
        elif mark and not (folder / mark).is_file() and any(folder.iterdir()):
            cause = f"holds other files and no {mark}"
    if cause:
        raise ConfigError(f"{folder} cannot be written, it {cause}; choose another folder.")
    return folder


def is_special(file: Path) -> bool:
    """Return whether a path is a named pipe or a device, at which reading would wait or never end.

    A socket is not one: it cannot be opened, so nothing waits.
    """
    try:
        mode = file.stat().st_mode
    except OSError:  # a dangling link
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir() and os.access(path, os.R_OK | os.X_OK)
    except OSError:
        return False


def _unreadable(file: Path, most_bytes: int | None) -> str | None:
    """Return why a path is no readable regular file, or None."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return "is a link to nothing" if file.is_symlink() else "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be read ({_cause(error)})"
    cause = None
    if stat.S_ISDIR(status.st_mode):
        cause = "is a folder"
    elif not stat.S_ISREG(status.st_mode):
        cause = "is a pipe or a device"
    elif not os.access(file, os.R_OK):
        cause = "cannot be read (permission denied)"
    elif most_bytes is not None and status.st_size > most_bytes:
        cause = f"has {status.st_size:,} bytes, more than {most_bytes:,}"
    return cause


def _unwritable(path: Path) -> str | None:
    """Return why nothing can be written at a path, or None.

    A file without a name is made in the nearest existing folder: permissions alone say nothing of
    read-only file systems, or of what the superuser may do.
    """
    try:
        temporary = temporary_path(path.absolute())
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in temporary.parts):
            return "has a name that is too long"
        temporary.lstat()
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        return "lies below a file"
    except (OSError, ValueError) as error:
        return f"is no possible path ({_cause(error)})"
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        return "lies below a file"
    try:
        with tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as error:
        return f"lies in {parent}, where nothing can be written ({_cause(error)})"


def _is_device_path(path: Path) -> bool:
    """Return whether a path lies among the devices, also if it leads to a regular file, as
    `/dev/stdout` may.
    """
    absolute = Path(os.path.normpath(path.absolute()))
    return absolute.is_relative_to(DEVICES) and not absolute.is_relative_to(MEMORY)


def _cause(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error).lower()


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
