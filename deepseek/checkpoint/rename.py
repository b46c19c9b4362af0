"""Renames that `os.rename` cannot do: to a new path only, and an exchange of two paths.

Linux has both in `renameat2`, on most file systems. Elsewhere callers get the next best.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

_CURRENT_FOLDER = -100
"""Linux's `AT_FDCWD`: relative paths start in the working folder."""

_NO_REPLACE, _EXCHANGE = 1, 2
"""Linux's `RENAME_NOREPLACE` and `RENAME_EXCHANGE`."""


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders so that none is missing at any moment, even after a kill.

    Returns:
        False if `second` does not exist or the system cannot exchange; nothing has changed then.
    """
    return _renameat2(first, second, _EXCHANGE) == 0


def rename_to_new(source: Path, target: Path) -> None:
    """Rename a file or folder to a path that does not exist.

    If the system has no such rename, the path is checked just before.

    Args:
        source: the file or folder.
        target: its new path, on the same file system.

    Raises:
        FileExistsError: something is at `target`, even an empty folder or a dangling link. It stays
            as it is, and so does `source`.
    """
    number = _renameat2(source, target, _NO_REPLACE)
    if number == 0:
        return
    if number == errno.EEXIST or os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def _renameat2(source: Path, target: Path, flag: int) -> int:
    """Return the error number of Linux's `renameat2`, 0 when it is done, `ENOSYS` elsewhere."""
    if sys.platform != "linux":
        return errno.ENOSYS
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # a C library from before 2018
        return errno.ENOSYS
    status = rename(
        _CURRENT_FOLDER, os.fsencode(source), _CURRENT_FOLDER, os.fsencode(target), flag
    )
    return 0 if status == 0 else ctypes.get_errno()
