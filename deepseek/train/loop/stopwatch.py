"""Seconds that a run takes, over all processes that work on it."""

import time
from pathlib import Path

from deepseek.checkpoint.store import read_object, write_json


class Stopwatch:
    """Measures the time since its creation, plus that kept by earlier processes of the run.

    Args:
        folder: run folder, which holds the seconds as `elapsed.json`.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "elapsed.json"
        stored = read_object(self._path).get("seconds") if self._path.is_file() else 0.0
        self._earlier = float(stored) if isinstance(stored, int | float) else 0.0
        self._started = time.monotonic()

    @property
    def here(self) -> float:
        """Seconds in this process."""
        return time.monotonic() - self._started

    @property
    def seconds(self) -> float:
        """Seconds in all processes, without those of a killed process after its last `keep`."""
        return self._earlier + self.here

    def leave_out(self, seconds: float) -> None:
        """Leave out seconds that have just passed."""
        self._started += seconds

    def keep(self) -> None:
        """Store the seconds for a later process."""
        write_json(self._path, {"seconds": self.seconds})
