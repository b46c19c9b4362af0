"""Start `deepseek serve` in its own process, as a user would, to measure it from outside."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

WORDS = [
    "time",
    "river",
    "stone",
    "market",
    "letter",
    "garden",
    "engine",
    "winter",
    "summer",
    "paper",
    "music",
]
"""Each is a single token in most vocabularies, with the space before it."""


@dataclass
class Served:
    """A ready server: its address `url` and its `process`."""

    url: str
    process: subprocess.Popen[str]


@contextmanager
def served(model: str, *dials: str) -> Iterator[Served]:
    """Serve `model` until the block ends; the server must then drain and exit with code 0."""
    # Terminating the measurement terminates the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    command = [
        sys.executable,
        "-m",
        "deepseek",
        "serve",
        model,
        "--port",
        "0",
        "--experts",
        "",
        *dials,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        while httpx.get(f"{url}/ready", timeout=60).status_code != 200:
            time.sleep(0.5)
        yield Served(url, process)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # do not interrupt the shutdown
        process.terminate()
        if process.wait(timeout=120):
            raise RuntimeError(f"the server ended with {process.returncode}")


def percentile(values: list[float], share: float) -> float:
    """Return the value below which a share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]
