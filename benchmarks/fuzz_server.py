"""Send random requests to a server with a tiny random model: no reply may be a 5xx or violate the
server's own OpenAPI description.

    python benchmarks/fuzz_server.py [--requests 10000] [--json FILE]
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from entry import run_main
from results import write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fuzzing import fuzz
from live_server import live

from deepseek.server.settings import Settings

EACH = 40


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    statuses: Counter[str] = Counter()
    started, turn = time.monotonic(), 0
    with (
        tempfile.TemporaryDirectory() as folder,
        live(Path(folder), Settings(answer_tokens=4), max_waiting=200) as server,
    ):
        while statuses.total() < options.requests:
            statuses += fuzz(server.url, EACH, turn)
            turn += 1
            print(f"{statuses.total()} requests, {dict(sorted(statuses.items()))}", flush=True)
        healthy = server.http().get("/ready").status_code == 200
    figures = {
        "requests": statuses.total(),
        "statuses": dict(sorted(statuses.items())),
        "violations": 0,
        "healthy": healthy,
        "seconds": time.monotonic() - started,
    }
    print(figures)
    if options.json:
        write(options.json, figures)


if __name__ == "__main__":
    run_main(main)
