"""Create files and folders at paths that a user names: complete or absent, one process at a time.

Writing them can take minutes and gigabytes. What others put at the path meanwhile is kept, and what
a killed attempt left is removed by the next one.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from deepseek.checkpoint.files import expanded, new_path
from deepseek.checkpoint.store import (
    atomic_folder,
    atomic_write,
    disk_full_explained,
    remove_leftovers,
    temporary_path,
)
from deepseek.errors import ConfigError


def no_room(path: str | Path) -> str:
    """Return the message for a full disk at the path of a new file or folder."""
    return (
        f"The disk of {path} is full, and nothing was written there; free some of it, and repeat."
    )


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder, which gets the name `out` when the block succeeds.

    The block may create files in it, but no folders.

    Args:
        out: the folder to create; nothing may be there, and nothing is replaced. `~` is the
            home folder.

    Raises:
        ConfigError: something is at `out` or was put there meanwhile, another process is writing
            it, or nothing can be written there.
        TrainError: the disk is full.
    """
    with (
        _reserve(out) as place,
        disk_full_explained(no_room(out)),
        atomic_folder(place, new=True) as temporary,
    ):
        yield temporary


@contextmanager
def new_file(out: str | Path) -> Iterator[Path]:
    """Yield a temporary path, whose file gets the name `out` when the block succeeds.

    Args:
        out: the file to create; nothing may be there, and nothing is replaced. `~` is the
            home folder.

    Raises:
        ConfigError: something is at `out` or was put there meanwhile, another process is writing
            it, or nothing can be written there.
        TrainError: the disk is full.
    """
    with (
        _reserve(out) as place,
        disk_full_explained(no_room(out)),
        atomic_write(place, new=True) as temporary,
    ):
        yield temporary


@contextmanager
def scratch_folder(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` for temporary files of the block.

    Args:
        out: what is written, by `new_folder` or `new_file` around this block: what a killed process
            leaves is removed by the next one that writes `out`.
    """
    scratch = temporary_path(Path(os.path.realpath(expanded(out))))
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder, or the link to it.

    Args:
        folder: the folder. No other process may be writing it: the caller holds its lock.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    # Renamed first: a half-deleted folder must not look whole.
    remove_leftovers(folder)
    doomed = temporary_path(folder)
    folder.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def _reserve(out: str | Path) -> Iterator[Path]:
    """Keep other processes from writing `out` during the block, and delete what killed ones left.

    Yields the path to write, with `~` and links resolved.

    The lock file is deleted with the block, as it would puzzle users among their own files.
    """
    place = Path(os.path.realpath(new_path(out)))
    place.parent.mkdir(parents=True, exist_ok=True)
    file = place.with_name(f".{place.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"{out} is being written by another process; wait until that ends, or choose another "
            "path."
        ) from None
    except OSError as error:  # such as the lock file of another user's killed process
        raise ConfigError(
            f"{file} cannot be locked ({error.strerror or error}); delete it, or choose another "
            "path."
        ) from None
    try:
        remove_leftovers(place)
        yield place
    finally:
        # Before the release: afterwards it may be the lock of another process. A process that has
        # opened it already sees that it was unlinked, and does not count it as acquired.
        file.unlink(missing_ok=True)
        lock.release()
