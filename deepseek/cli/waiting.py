"""Say on standard error what a command waits for, one line per step."""

import time

from deepseek.cli.output import echo
from deepseek.cli.units import duration


class Waiting:
    """Prints the name of each step as it begins; called like a progress bar.

    The last step is the one that reaches its total; it is printed with the time since the first.
    """

    def __init__(self) -> None:
        self._what = ""
        self._started = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        if what == self._what:
            return
        self._what = what
        is_last = 0 < total <= done
        passed = duration(time.monotonic() - self._started)
        echo(f"{what} after {passed}" if is_last else f"{what} ...", error=True)
