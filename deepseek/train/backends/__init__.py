"""Where parameters live and who else trains: one process, or many that each hold a part (FSDP2 under `torchrun`).

The loop speaks to `Backend` alone; `current` returns the one that this process was started for.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from deepseek.train.backends.backend import Backend

__all__ = ["SINGLE", "Backend", "current"]

SINGLE = Backend()


@contextmanager
def current() -> Iterator[Backend]:
    """Give the backend of this process: FSDP2 where `torchrun` started it, else one process alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield SINGLE
        return
    from deepseek.train.backends.fsdp2 import joined

    with joined() as backend:
        yield backend
