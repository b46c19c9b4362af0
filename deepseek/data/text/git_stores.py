"""The folders from which git reads a repository, so that they can be kept below another folder."""

import os
import re
from pathlib import Path

import pygit2
from pygit2.enums import RepositoryOpenFlag

from deepseek.errors import DataError

MAX_STORES = 16
"""Most folders over which a repository may be spread."""


def repository_stores(path: Path) -> list[Path]:
    """Return every folder from which git reads the repository at `path`, links resolved.

    These are its git folder (possibly through a `.git` file or link), the folder shared with other
    work trees, and the object stores of both with their alternates. Unlike `open_repository`, this
    does not search the parents of `path`.

    Raises:
        DataError: `path` itself is not a repository, it has more than `MAX_STORES` stores (for
            example a chain of alternates), or names one that cannot be.
    """
    try:
        repository = pygit2.Repository(str(path), RepositoryOpenFlag.NO_SEARCH)
    except (pygit2.GitError, KeyError, ValueError):
        raise DataError(
            f"{path} is not a git repository itself; name the folder that holds its .git."
        ) from None
    try:
        return _stores(Path(repository.path).resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long or with a NUL
        raise DataError(
            f"{path} names a store of objects that cannot be; run `git fsck`, or clone it again."
        ) from None


def _stores(git_folder: Path) -> list[Path]:
    stores = [git_folder]
    pointer = git_folder / "commondir"
    if pointer.is_file():
        target = os.fsdecode(pointer.read_bytes().rstrip())
        stores.append((git_folder / target).resolve())
    own = [(store / "objects").resolve() for store in stores]
    pending = list(own)
    while pending:
        objects = pending.pop()
        if objects in stores:
            continue
        if len(stores) > MAX_STORES:
            raise DataError(
                f"{git_folder} has more than {MAX_STORES} object stores; repack it into one."
            )
        stores.append(objects)
        pending += alternates(objects, first=objects in own)
    return stores


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
