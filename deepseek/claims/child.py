"""A benchmark as a process of its own that stops at a safe point when this one is told to stop."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

STOPPING_SECONDS = 60.0
"""Longest time that an interrupted benchmark gets to stop at a safe point."""

STOPS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process and are passed on as an interrupt, beside Ctrl-C."""


def run_python(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
    """Run Python and return its exit code; an interrupt is passed on once, and waited for.

    SIGTERM and SIGHUP interrupt it as well, and then end this process by `SystemExit`.

    Args:
        words: arguments of Python.
        folder: folder to run it in.
        environment: its environment variables.
    """
    with _stops_raised():
        # A process group of its own: a terminal would interrupt it as well, and it would be twice.
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
        try:
            return process.wait()
        except BaseException:
            _signal(process.pid, signal.SIGINT)
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOPPING_SECONDS)
            finally:
                _signal(process.pid, signal.SIGKILL)
            raise


def _signal(group: int, number: signal.Signals) -> None:
    """Send a signal to what is left of a process group."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)


@contextmanager
def _stops_raised() -> Iterator[None]:
    """Let signals that end the process raise `SystemExit` within the block.

    A signal that is ignored stays so, as `nohup` wants it, and so does one with another handler.
    """
    usual = []
    if threading.current_thread() is threading.main_thread():  # only it can handle signals
        usual = [number for number in STOPS if signal.getsignal(number) is signal.SIG_DFL]
    for number in usual:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in usual:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
