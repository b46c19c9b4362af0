"""Where a measurement goes: a JSON file that also says on which machine, at which commit and by
which command.
"""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

FOLDER = Path(__file__).parent / "results"


def processor() -> str:
    """Return the processor's name and number of usable cores."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {len(names) or '?'} cores, {torch.backends.cpu.get_cpu_capability()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def commit() -> str:
    """Return the commit of this checkout, with a mark if it has uncommitted changes."""
    root = Path(__file__).parent.parent
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "unknown"


def write(path: Path, figures: dict[str, Any]) -> None:
    """Write `figures` with their circumstances to `path`."""
    record = {
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write `figures` with their circumstances to `results/<name>.json` and return the path."""
    path = FOLDER / f"{name}.json"
    write(path, figures)
    return path
