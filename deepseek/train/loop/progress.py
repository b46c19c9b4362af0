"""Progress and interruption of long jobs.

Progress is a bar on a terminal, and a line every few seconds elsewhere. Ctrl-C stops at a safe
point.
"""

import signal
import sys
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deepseek.terminal import visible

LINE_SECONDS = 5.0
"""Seconds between two lines without a terminal, so that logs stay short."""


class LastingConsole(Console):
    """A console that goes quiet on a broken pipe, so that the job goes on."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on; Rich's own handler ends the process."""
        self.quiet = True


class ProgressBar:
    """Progress of jobs that run one after another, called as `bar(done, total, what)`.

    Calls are cheap enough for every step. A total of 0 means unknown, and the total may change. A
    new `what` starts a new bar.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        """Write to `stream` (standard error if None), or nowhere if `quiet`."""
        console = LastingConsole(file=stream or sys.stderr, quiet=quiet)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._bar = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
        self._what = ""
        self._written = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, what: str, note: str = "") -> None:
        if self._bar.console.quiet:
            return
        what = visible(what)
        if what != self._what:
            self._what = what
            self._written = 0.0
            self._bar.add_task(what, total=None, note="")
        self._bar.update(self._bar.task_ids[-1], completed=done, total=total or None, note=note)
        if self._bar.disable:
            self._line(done, total, note)

    def say(self, message: str) -> None:
        """Write one line above the bar."""
        self._bar.console.print(
            visible(message), markup=False, highlight=False, emoji=False, soft_wrap=True
        )

    def _line(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if now - self._written < LINE_SECONDS and not (total and done >= total):
            return
        self._written = now
        seconds = self._bar.tasks[-1].time_remaining
        left = f", {timedelta(seconds=seconds)} left" if seconds else ""
        share = f": {done}/{total} {done / total:4.0%}" if total else f": {done}" if done else ""
        self.say(f"{self._what}{share}{left}  {note}".rstrip())


def say(message: str, quiet: bool = False) -> None:
    """Write one line to where progress is shown, between two jobs.

    Args:
        message: the line.
        quiet: write nothing.
    """
    with ProgressBar(quiet=quiet) as progress:
        progress.say(message)


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptGuard:
    """Context in which the first SIGINT or SIGTERM only sets `asked`, and the second interrupts.

    Only the main thread can handle signals; in other threads the guard does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
