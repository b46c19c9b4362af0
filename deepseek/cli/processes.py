"""Processes of this user that have a file open, such as a server with a model's weights."""

import os
from contextlib import suppress
from pathlib import Path


def processes_at(path: Path) -> list[str]:
    """Return id and name of the other processes that have mapped or opened a file.

    The list is empty on systems where psutil cannot read this.

    Args:
        path: the file, or the folder of several.
    """
    import psutil

    users = []
    prefix = str(path.resolve())
    for process in psutil.process_iter(["pid", "name"]):
        if process.pid == os.getpid():
            continue
        with suppress(psutil.Error, AttributeError, OSError):
            open_paths = [file.path for file in process.open_files()]
            mapped_paths = [region.path for region in process.memory_maps()]
            if any(_is_below(file, prefix) for file in (*open_paths, *mapped_paths)):
                users.append(f"{process.pid} ({process.info['name']})")
    return users


def _is_below(file: str, prefix: str) -> bool:
    return file == prefix or file.startswith(f"{prefix}{os.sep}")
