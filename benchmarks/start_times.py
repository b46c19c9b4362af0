"""Wall and processor time of commands that need no model.

    python benchmarks/start_times.py --before PATH   # PATH: a checkout of an older commit

Each command runs in a fresh process with an empty home, the two checkouts in turn. Reported are
median wall and processor seconds, and whether torch is loaded. On a busy machine, compare processor
seconds.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results
from entry import existing_path, run_main

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "--help",
    "expert list",
    "models list",
    "runs list",
    "prefs stats",
    "plan",
    "bench",
    "expert train --help",
)
PROGRAM = (
    "import sys\nfrom deepseek.cli.main import main\n"
    "try: main(sys.argv[1:])\nfinally: print('torch' in sys.modules, file=sys.stderr)"
)


def once(checkout: Path, command: str, home: str) -> dict[str, Any]:
    """Run a command once; return wall and processor seconds, whether torch was loaded, and the exit
    code.
    """
    environment = os.environ | {"PYTHONPATH": str(checkout), "DEEPSEEK_HOME": home}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command.split()],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = process.stderr.split("\n")
    return {"wall": wall, "cpu": cpu, "torch": "True" in lines, "status": process.returncode}


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of several runs; status and torch are the last one's."""
    figures = {key: statistics.median(run[key] for run in runs) for key in ("wall", "cpu")}
    return figures | {key: runs[-1][key] for key in ("torch", "status")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=existing_path, help="a checkout of an older commit")
    parser.add_argument("--runs", type=int, default=5, help="runs of each command")
    parser.add_argument("--save", action="store_true", help="write results/start_times.json")
    options = parser.parse_args()
    sides = {"after": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    table: dict[str, dict[str, Any]] = {}
    for command in COMMANDS:
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(options.runs + 1):
            for side, checkout in sides.items():
                with tempfile.TemporaryDirectory() as home:
                    runs[side].append(once(checkout, command, home))
        table[command] = {side: median(runs[side][1:]) for side in sides}  # the first one warms up
        for side, figures in table[command].items():
            state = "" if figures["status"] == 0 else f"  exit code {figures['status']}"
            loaded = "  loads torch" if figures["torch"] else ""
            print(
                f"{command:22}{side:8}{figures['wall']:7.2f} s {figures['cpu']:7.2f} s of "
                f"processor time{loaded}{state}",
                flush=True,
            )
    if options.save:
        print(results.save("start_times", {"runs": options.runs, "commands": table}))


if __name__ == "__main__":
    run_main(main)
