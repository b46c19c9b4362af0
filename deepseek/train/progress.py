"""Progress of long jobs: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 5.0
"""Time between two lines where there is no terminal, so that logs stay short."""


class ProgressBar:
    """Shows jobs one after another; called as `bar(done, total, what)`, with total 0 where it is unknown.

    A call is cheap and may come at every step. The total may change; a new `what` begins a new job.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        """Write to `stream` (standard error if None), or nowhere if `quiet`."""
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._started = self._written = 0.0
        self._first = 0

    def __enter__(self) -> Self:
        if self._stream.isatty() and not self._quiet:
            columns = (
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self._bar = Progress(*columns, console=Console(file=self._stream))
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str, note: str = "") -> None:
        if self._quiet:
            return
        if what != self._what:
            self._begin(what, done)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total or None, note=note)
        else:
            self._line(done, total, note)

    def say(self, message: str) -> None:
        """Write one line above the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, file=self._stream, flush=True)

    def _begin(self, what: str, done: int) -> None:
        self._what, self._first = what, done
        self._started, self._written = time.monotonic(), 0.0
        if self._bar is not None:
            self._task = self._bar.add_task(what, total=None, note="")

    def _line(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if now - self._written < LINE_SECONDS and not (total and done >= total):
            return
        self._written = now
        share = f"{done}/{total} {done / total:4.0%}" if total else f"{done}"
        print(f"{self._what}: {share}{self._left(done, total, now)}  {note}".rstrip(), file=self._stream, flush=True)

    def _left(self, done: int, total: int, now: float) -> str:
        """Return the time left at the speed so far."""
        if not total or done <= self._first or done >= total:
            return ""
        seconds = (now - self._started) / (done - self._first) * (total - done)
        return f", {int(seconds // 60)}:{int(seconds % 60):02d} left"
