"""Write measurements to JSON files that also record the machine, commit and command."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from deepseek.checkpoint.store import home

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"


def processor() -> str:
    """Return the processor's name, number of cores and vector instructions."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {len(names) or '?'} cores, {torch.backends.cpu.get_cpu_capability()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def commit() -> str:
    """Return the commit of this checkout, marked if it has uncommitted changes."""
    words = ["git", "describe", "--always", "--dirty"]
    try:
        asked = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return asked.stdout.strip() or "unknown"


COMMIT = commit()
"""The commit when the measurement began; it may change during a long one."""


_resumed: set[str] = set()


def resumed(work: Path) -> Path:
    """Create the folder in which a measurement keeps finished parts, and return it.

    The commit is added to `commits.txt` there. `write` then names every commit that parts of the
    figures may come from, and they are stale if the code has changed since any of them.
    """
    work.mkdir(parents=True, exist_ok=True)
    record = work / "commits.txt"
    earlier = record.read_text().split() if record.exists() else []
    if COMMIT not in earlier:
        with record.open("a") as lines:
            lines.write(f"{COMMIT}\n")
    _resumed.update(earlier)
    return work


def command() -> str:
    """Return the running command, as typed in the root of the checkout."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    # The locations of the checkout and of the user's home are not part of the measurement.
    places = {f"{ROOT}/": "", str(home() / "corpora"): "CORPORA"}
    words = ["python", str(shown), *sys.argv[1:]]
    for place, name in places.items():
        words = [word.replace(place, name) for word in words]
    return shlex.join(words)


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the option `--json` for the output file; default: `results/<name>.json`."""
    parser.add_argument(
        "--json", type=Path, default=FOLDER / f"{name}.json", help="file to write the figures to"
    )


def write(path: Path, figures: dict[str, Any]) -> None:
    """Write `figures` with machine, commit, command and versions to `path`, atomically."""
    record = {
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "commit": COMMIT,
        **({"earlier_commits": sorted(earlier)} if (earlier := _resumed - {COMMIT}) else {}),
        "command": command(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    whole.write_text(json.dumps(record, indent=1) + "\n")
    whole.replace(path)


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write `figures` to `results/<name>.json` as `write` does, and return the path."""
    path = FOLDER / f"{name}.json"
    write(path, figures)
    return path
