"""One writer per run folder.

The lock is the operating system's (`flock`) on a file beside the folder, so it ends with the
process that holds it, even if that is killed. A second file says who holds it.
"""

import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deepseek.checkpoint.store import read_object, write_json
from deepseek.errors import CheckpointError, TrainError


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder during the block.

    The thread that holds the lock can take it again. Others fail at once; none waits.

    Args:
        folder: the folder, which need not exist.

    Raises:
        TrainError: another process or thread holds the lock; the message says which.
    """
    folder = folder.expanduser().resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    owner = folder.with_name(f".{folder.name}.owner.json")
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise TrainError(
            f"{folder} is in use by {_described(owner)}; wait until that ends, or give "
            "another name."
        ) from None
    try:
        if lock.lock_counter == 1:
            write_json(owner, _this_process())
        yield
    finally:
        if lock.lock_counter == 1:
            owner.unlink(missing_ok=True)
        lock.release()


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(" ", "seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
    }


def _described(owner: Path) -> str:
    """Return who holds a lock, as far as the file `owner` says."""
    with suppress(CheckpointError):
        record = read_object(owner)
        return (
            f"process {record.get('pid')} on {record.get('host')} since {record.get('started')} "
            f"(`{record.get('command')}`)"
        )
    return "another process"
