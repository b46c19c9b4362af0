"""Find the folders from which git reads a repository, to confine them to a parent folder and to
check them for damage.
"""

import os
import re
import zlib
from pathlib import Path

import pygit2
from pygit2.enums import RepositoryOpenFlag

from deepseek.checkpoint.files import is_special
from deepseek.errors import DataError

MAX_STORES = 16
"""Maximum folders over which a repository may be spread."""

LOOSE_OBJECT = re.compile(r"[0-9a-f]{2}/[0-9a-f]{38,62}")
"""Path of a loose object in its store."""

CHUNK = 1 << 16
"""Bytes of a loose object that are read, and inflated, at a time."""


def repository_stores(path: Path) -> list[Path]:
    """Return every folder from which git reads the repository at `path`, links resolved.

    These are its git folder (possibly through a `.git` file or link), the folder shared with other
    work trees, and the object stores of both with their alternates. Unlike `open_repository`, this
    does not search the parents of `path`.

    Raises:
        DataError: `path` itself is not a repository, it has more than `MAX_STORES` stores (for
            example a chain of alternates), or names an impossible one.
    """
    try:
        repository = pygit2.Repository(str(path), RepositoryOpenFlag.NO_SEARCH)
    except (pygit2.GitError, KeyError, ValueError):
        raise DataError(
            f"{path} is not a git repository itself; name the folder that holds its .git."
        ) from None
    return stores_of(Path(repository.path))


def stores_of(git_folder: Path) -> list[Path]:
    """Return every folder from which git reads a repository, as `repository_stores` does.

    Args:
        git_folder: the repository's git folder.

    Raises:
        DataError: there are more than `MAX_STORES`, or one is impossible.
    """
    try:
        return _stores(git_folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long or with a NUL
        raise DataError(
            f"{git_folder} names a store of objects that cannot be; run `git fsck`, or clone it "
            "again."
        ) from None


def _stores(git_folder: Path) -> list[Path]:
    stores = [git_folder]
    if (shared := common_folder(git_folder)) is not None:
        stores.append(shared)
    own_folders = [(store / "objects").resolve() for store in stores]
    pending = list(own_folders)
    while pending:
        objects = pending.pop()
        if objects in stores:
            continue
        if len(stores) > MAX_STORES:
            raise DataError(
                f"{git_folder} has more than {MAX_STORES} object stores; repack it into one."
            )
        stores.append(objects)
        pending += alternates(objects, first=objects in own_folders)
    return stores


def common_folder(git_folder: Path) -> Path | None:
    """Return the git folder that a linked work tree (`git worktree add`) shares with the main one;
    None if `git_folder` is not that of a linked work tree.
    """
    pointer = git_folder / "commondir"
    if not pointer.is_file():
        return None
    target = os.fsdecode(pointer.read_bytes().rstrip())
    return (git_folder / target).resolve()


def alternates(objects: Path, *, first: bool) -> list[Path]:
    """Return every folder that an object store may name as a further one, links resolved.

    Git takes a relative name from the store. libgit2 (1.9) does so only with a name in a
    repository's own store that begins with a dot, and takes others from the working folder; both
    are returned.

    Args:
        objects: the store.
        first: whether it is the repository's own.
    """
    file = objects / "info" / "alternates"
    if not file.is_file():
        return []
    # Not `splitlines`, which also splits at form feeds and others that are part of a name.
    lines = re.split(rb"[\r\n]", file.read_bytes())
    names = [os.fsdecode(line) for line in lines if line and not line.startswith(b"#")]
    from_store = [(objects / name).resolve() for name in names]
    elsewhere = [name for name in names if not (first and name.startswith("."))]
    return from_store + [Path(name).resolve() for name in elsewhere]


def refuse_endless(git_folder: Path) -> None:
    """Raise `DataError` if a file of a repository is one at which libgit2 would wait forever.

    These are named pipes, devices, and loose objects that are cut short: their inflation never
    ends (libgit2 1.9).

    Args:
        git_folder: the repository's git folder. The folder shared with other work trees and the
            alternates are checked too.
    """
    stores = stores_of(git_folder)
    for store in stores:
        if not any(store != other and store.is_relative_to(other) for other in stores):
            _refuse_endless_below(store, stores)


def _refuse_endless_below(root: Path, stores: list[Path]) -> None:
    """Apply `refuse_endless` to the files below one folder.

    Args:
        root: the folder.
        stores: all stores of the repository; the loose objects lie below them.
    """
    for folder, _, names in os.walk(root):
        for name in names:
            file = Path(folder, name)
            if is_special(file):
                raise DataError(f"{file} is a pipe or a device; clone the repository again.")
            is_loose = file.parent.parent in stores and LOOSE_OBJECT.fullmatch(
                f"{file.parent.name}/{name}"
            )
            if is_loose and not _is_whole(file):
                raise DataError(
                    f"The git repository at {stores[0]} is damaged ({file} is cut short); run "
                    "`git fsck` in it, or clone it again."
                )


def _is_whole(file: Path) -> bool:
    """Return whether the compressed stream of a loose object reaches its end."""
    stream = zlib.decompressobj()
    try:
        with open(file, "rb") as source:
            data = source.read(CHUNK)
            content = data
            while (data or content) and not stream.eof:
                content = stream.decompress(data, CHUNK)
                data = stream.unconsumed_tail or source.read(CHUNK)
    except (OSError, zlib.error):
        return False
    return stream.eof
