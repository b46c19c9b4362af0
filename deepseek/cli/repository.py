"""Checks of `--from-git` that are made before anything is fetched."""

import re
from pathlib import Path

from deepseek.errors import ConfigError, DataError

ADDRESS = re.compile(r"(https?|ssh|git|ftps?):/+(?=.)|[\w.-]+@[\w.-]+:(?=.)")
"""Beginning of an address that `git clone` takes, as `Path` writes it: with one slash."""


def refuse_address(path: Path | str | None) -> None:
    """Refuse the address of a repository elsewhere.

    Args:
        path: value of `--from-git`; None: not given.

    Raises:
        ConfigError: it is such an address.
    """
    scheme = ADDRESS.match(str(path or ""))
    if scheme is None or Path(str(path)).exists():
        return
    rest = str(path)[scheme.end() :]
    address = f"{scheme[1]}://{rest}" if scheme[1] else str(path)
    raise ConfigError(
        f"--from-git takes a clone on this machine; clone it first with "
        f"`git clone {address}`, and give its folder."
    )


def current_root() -> Path:
    """Return the root of the repository that the current folder is in; the folder itself if it is
    in none that can be read.
    """
    from deepseek.data.text.git import open_repository

    try:
        return Path(open_repository(Path()).workdir or "")
    except DataError:
        return Path()


def check_repository(path: Path) -> None:
    """Refuse what cannot be trained on: an address, or a folder without a git history.

    Args:
        path: value of `--from-git`.

    Raises:
        ConfigError: it is an address.
        DataError: there is no repository, or it has no commits.
    """
    from deepseek.data.text.git import find_commit, open_repository

    refuse_address(path)
    find_commit(open_repository(path), "HEAD")
