"""Import and search times of a large preference database.

    python benchmarks/preferences.py [--pairs 100000] [--json FILE]

The pairs are made from words of Python's help topics, so that common and rare words occur as they
do in real text. The import is `deepseek prefs import` in its own process; for each query the median
of five searches is reported.
"""

import argparse
import json
import pydoc_data.topics
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from entry import run_main
from results import write

from deepseek.data.preferences.database import PreferenceDatabase

QUERIES = (
    "the",
    "the of and",
    "iterator",
    "exception handler",
    "metaclass",
    "nowhere to be found",
    "",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file, path = Path(folder) / "pairs.jsonl", Path(folder) / "preferences.db"
        write_pairs(file, options.pairs)
        command = [
            sys.executable,
            "-m",
            "deepseek",
            "prefs",
            "import",
            str(file),
            "--database",
            str(path),
        ]
        seconds, again = timed(command), timed(command)
        database = PreferenceDatabase(path)
        found = {query: search_time(database, query) for query in QUERIES}
        database.check()
        figures = {
            "pairs": database.statistics().pairs,
            "import_seconds": round(seconds, 1),
            "import_again_seconds": round(again, 1),
            "megabytes": round(path.stat().st_size / 1e6, 1),
            "search_milliseconds": found,
        }
    for name, value in figures.items():
        print(f"{name:24} {value}")
    if options.json:
        write(options.json, figures)


def write_pairs(file: Path, count: int) -> None:
    rng = random.Random(0)
    words = " ".join(pydoc_data.topics.topics.values()).split()

    def text(length: int) -> str:
        start = rng.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    with open(file, "w", encoding="utf-8") as lines:
        for number in range(count):
            record = {
                "prompt": f"{number}: {text(20)}",
                "chosen": f"a {text(60)}",
                "rejected": f"b {text(60)}",
            }
            lines.write(json.dumps(record) + "\n")


def timed(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def search_time(database: PreferenceDatabase, query: str) -> float:
    """Return the median milliseconds of five searches for the newest 20 matches."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        database.search(query)
        times.append(1000 * (time.perf_counter() - started))
    return round(median(times), 2)


if __name__ == "__main__":
    run_main(main)
