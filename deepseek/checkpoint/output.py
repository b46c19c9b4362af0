"""New files and folders at places that a user names: whole or absent, by one process at a time.

Work of minutes and gigabytes goes into them. So what others put there meanwhile stays, and what an
attempt left that was killed goes away with the next one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek.checkpoint.files import new_path
from deepseek.checkpoint.store import atomic_folder, atomic_write


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder, which gets the name `out` when the block succeeds.

    The block may create files in it, but no folders.

    Args:
        out: the folder to create; nothing may be there, and nothing is replaced.

    Raises:
        ConfigError: something is at `out` or was put there meanwhile, or nothing can be written.
    """
    with atomic_folder(new_path(out), new=True) as temporary:
        yield temporary


@contextmanager
def new_file(out: str | Path) -> Iterator[Path]:
    """Yield a temporary path, whose file gets the name `out` when the block succeeds.

    Args:
        out: the file to create; nothing may be there, and nothing is replaced.

    Raises:
        ConfigError: something is at `out` or was put there meanwhile, or nothing can be written.
    """
    with atomic_write(new_path(out), new=True) as temporary:
        yield temporary
