"""Say on standard error what a command waits for, one line per step."""

import time

from deepseek.cli.output import echo
from deepseek.cli.units import duration


class Waiting:
    """Prints the name of each step as it begins; called like a progress bar.

    The last step is the one that reaches its total; it is printed with the time since the first.
    """

    def __init__(self) -> None:
        self._activity = ""
        self._start_time = time.monotonic()

    def __call__(self, done: int, total: int, activity: str) -> None:
        if activity == self._activity:
            return
        self._activity = activity
        is_last = 0 < total <= done
        elapsed = duration(time.monotonic() - self._start_time)
        echo(f"{activity} after {elapsed}" if is_last else f"{activity} ...", error=True)
