"""Wait for events in other threads and processes."""

import time
from collections.abc import Callable

PATIENCE = 120
"""Seconds to wait before giving up; shared machines stall for several seconds."""


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until a condition holds; fail if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
