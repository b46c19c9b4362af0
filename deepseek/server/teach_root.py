"""The folder below which training text must be: list it, and find links that lead out of it."""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import Query

from deepseek.data.text.filters import VENDORED, folder_reason, reason_by_path
from deepseek.server.errors import ApiError
from deepseek.server.field_errors import WITHOUT_NUL
from deepseek.server.settings import Settings
from deepseek.terminal import is_unicode

OUT_OF_BOUNDS = (
    "path must name a file or folder below the server's teach root, and so must all its links."
)

CHECK_SECONDS = 10.0
"""Time limit for checking the links below a folder."""

COUNT_SECONDS = 1.0
"""Time limit for counting the text below a folder."""

MOST_FOLDERS = 1000
"""Maximum number of folders in one listing."""

RelativePath = Annotated[str, Query(max_length=4096, pattern=WITHOUT_NUL)]


def teach_root(settings: Settings) -> Path:
    """Return the teach root with all its links resolved. Raises `ApiError` if teaching is off."""
    if settings.teach_root is None:
        raise ApiError(
            403, "Teaching is off; start the server with --teach-root FOLDER.", code="teaching_off"
        )
    return settings.teach_root.resolve()


def below(root: Path, path: str) -> Path:
    """Return the path that a client names, with all links resolved.

    Args:
        root: the resolved teach root.
        path: path relative to it.

    Raises:
        ApiError: it is outside the teach root or missing.
    """
    try:
        found = (root / path).resolve()
        usable = found.is_relative_to(root) and found.exists()
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a name that is too long
        usable = False
    if not usable:
        raise ApiError(400, OUT_OF_BOUNDS, param="path")
    return found


def listing(root: Path, folder: Path) -> dict[str, Any]:
    """Return the folders in a folder, and how much text it holds.

    Links and hidden folders are left out, so that the listing leads nowhere else.

    Args:
        root: the resolved teach root.
        folder: a folder below it.

    Raises:
        ApiError: it is no folder, or cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if _is_listed(entry))
    except OSError:
        raise ApiError(
            400, "path must name a folder that the server can read.", param="path"
        ) from None
    inside = [{"name": name, "repository": _is_repository(folder / name)} for name in names]
    return {
        "object": "folder",
        "path": folder.relative_to(root).as_posix(),
        "repository": _is_repository(folder),
        "folders": inside[:MOST_FOLDERS],
        **count_text(folder),
    }


def _is_listed(entry: os.DirEntry[str]) -> bool:
    plain = not entry.name.startswith(".") and is_unicode(entry.name)
    return plain and entry.is_dir(follow_symlinks=False)


def _is_repository(folder: Path) -> bool:
    return (folder / ".git").is_dir()


def count_text(folder: Path) -> dict[str, Any]:
    """Return the number and bytes of the files that a training would read, and whether there was
    time to count all of them.
    """
    deadline = time.monotonic() + COUNT_SECONDS
    files = 0
    size = 0
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in VENDORED]
        for name in names:
            if time.monotonic() > deadline:
                return {"files": files, "bytes": size, "complete": False}
            path = Path(place) / name
            if name.startswith(".") or path.is_symlink() or reason_by_path(name) is not None:
                continue
            files += 1
            size += path.stat().st_size
    return {"files": files, "bytes": size, "complete": True}


def entered(folder: Path) -> Iterator[Path]:
    """Yield what is below a folder, without the inside of folders that a training does not enter,
    such as a virtual environment, whose links lead to the machine's Python.
    """
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if folder_reason(Path(place, name)) is None]
        yield from (Path(place, name) for name in (*inner, *names))


def leads_out(paths: Iterable[Path], root: Path) -> bool:
    """Return whether a link among `paths` points outside `root` or is part of a loop.

    Raises:
        ApiError: there are too many files to check.
    """
    deadline = time.monotonic() + CHECK_SECONDS
    for path in paths:
        if time.monotonic() > deadline:
            raise ApiError(
                400,
                f"The files below path took longer than {CHECK_SECONDS:g} s to check; "
                "name a smaller folder.",
                param="path",
            )
        if not path.is_symlink():
            continue
        try:
            inside = path.resolve().is_relative_to(root)
        except (OSError, RuntimeError):
            inside = False
        if not inside:
            return True
    return False
