"""Run benchmarks in child processes, which stop at a safe point when this process is
interrupted.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

STOPPING_SECONDS = 60.0
"""Seconds that an interrupted benchmark has to stop at a safe point."""

POLL_SECONDS = 0.05

STOPS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process and are passed on as an interrupt, beside Ctrl-C."""


def run_python(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
    """Run Python and return its exit code; an interrupt is passed on once, then awaited.

    SIGTERM and SIGHUP interrupt it as well, and then end this process by `SystemExit`.

    Args:
        words: arguments of Python.
        folder: folder to run it in.
        environment: its environment variables.
    """
    statuses: list[int] = []
    run_pythons({"": words}, folder, environment, on_end=lambda _, status: statuses.append(status))
    return statuses[0]


def run_pythons(
    programs: Mapping[str, Sequence[str]],
    folder: Path,
    environment: Mapping[str, str],
    on_end: Callable[[str, int], None],
    on_start: Callable[[str], None] | None = None,
    at_once: int = 1,
    output: Mapping[str, Path] | None = None,
) -> None:
    """Run several Python programs in order; an interrupt stops the running ones as in `run_python`.

    Args:
        programs: arguments of Python by name.
        folder: folder to run them in.
        environment: their environment variables.
        on_end: called with the name and the exit code of each that has ended.
        on_start: called with the name of each before it starts; default: none.
        at_once: number that run side by side (default: 1).
        output: file for what each prints; None: where this process prints.
    """
    pending_names = list(programs)[::-1]
    running: dict[str, subprocess.Popen[bytes]] = {}
    with _stops_raised():
        try:
            while pending_names or running:
                while pending_names and len(running) < at_once:
                    name = pending_names.pop()
                    if on_start:
                        on_start(name)
                    file = output[name] if output else None
                    with _signals_held():
                        running[name] = _start(programs[name], folder, environment, file)
                for name, process in list(running.items()):
                    status = process.poll()
                    if status is not None:
                        del running[name]
                        on_end(name, status)
                time.sleep(POLL_SECONDS)
        except BaseException:
            _stop_all(list(running.values()))
            raise


def _start(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], output: Path | None
) -> subprocess.Popen[bytes]:
    """Start Python in a process group of its own.

    Otherwise the terminal would interrupt it too, and it would get the interrupt twice.
    """
    with output.open("wb") if output else nullcontext() as file:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            process_group=0,
        )


def _stop_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt processes, wait until they have stopped at a safe point, and kill what is left."""
    for process in processes:
        _signal(process.pid, signal.SIGINT)
    deadline = time.monotonic() + STOPPING_SECONDS
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            _signal(process.pid, signal.SIGKILL)


def _signal(group: int, number: signal.Signals) -> None:
    """Send a signal to the processes of a group that still run."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)


@contextmanager
def _stops_raised() -> Iterator[None]:
    """Let signals that end the process raise `SystemExit` within the block.

    An ignored signal stays ignored, as `nohup` requires, and a signal with another handler keeps
    it. Only an ignored Ctrl-C, as in a shell's background job, gets a handler that does nothing:
    child processes inherit ignored signals, and could not be interrupted.
    """
    old_handlers: dict[signal.Signals, signal.Handlers] = {}
    if threading.current_thread() is threading.main_thread():  # only it can handle signals
        for number in STOPS:
            if signal.getsignal(number) is signal.SIG_DFL:
                old_handlers[number] = signal.SIG_DFL
                signal.signal(number, _stop)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            old_handlers[signal.SIGINT] = signal.SIG_IGN
            signal.signal(signal.SIGINT, _ignore_signal)
    try:
        yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Handle signals after the block: one that raised while a process starts would leave it behind,
    unknown to those who stop it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *STOPS)}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in held:
        signal.signal(number, lambda raised, _: noted.append(raised))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    for got in noted:
        signal.raise_signal(got)


def _ignore_signal(_number: int, _frame: FrameType | None) -> None:
    """Handle a signal by doing nothing."""


def _stop(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
