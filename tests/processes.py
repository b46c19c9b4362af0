"""Run commands in separate processes."""

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

PATIENCE = 900
"""Seconds after which a command counts as hung; the longest takes seven minutes on two cores."""


def run(
    command: Sequence[str | Path], *, timeout: float = PATIENCE, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its exit status and output; fail if it takes too long.

    `subprocess.run` would kill only the command, and wait forever for its children, which hold the
    same output.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_with_children(process)
            output, errors = process.communicate()
            pytest.fail(f"more than {timeout:g} s: {command}\n{output[-2000:]}\n{errors[-4000:]}")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """Kill a process, if it still runs, and all its descendants."""
    if process.poll() is not None:
        return
    parent = psutil.Process(process.pid)
    for one in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
