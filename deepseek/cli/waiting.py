"""Say on standard error what a command waits for, one line per step."""

import time

from deepseek.cli.output import echo
from deepseek.cli.units import duration


class Waiting:
    """Prints the name of each step as it begins; called like a progress bar.

    A step whose total is reached is the last one, and printed with the time since the first.
    """

    def __init__(self) -> None:
        self._what = ""
        self._started = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        if what == self._what:
            return
        self._what = what
        after = f" after {duration(time.monotonic() - self._started)}" if total else " ..."
        echo(f"{what}{after if not total or done >= total else ''}", error=True)
