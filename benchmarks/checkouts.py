"""Compare the speed of the compiled step in several checkouts of this repository.

    git worktree add ../before COMMIT
    python benchmarks/checkouts.py ../before . [--rounds 15] [--threads 2] [--json FILE]

It shows what a change to the kernels costs or gains. Each checkout runs in its own process with
this Python, and each has one turn per round: a prefill of 512 random tokens, then 64 tokens one by
one. Reported are median tokens per second, the median over rounds of the ratio to the first
checkout, and the processor time until a checkout is ready, which includes compiling the kernels
unless they are cached. `--processor` measures processor time instead of wall time, which is more
reliable on a busy machine; use it with `--threads 1`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from entry import existing_path, run_main
from results import write
from turns import Turn, in_turn

SIDE = """
import json, sys, time
base, threads, clock = sys.argv[1], int(sys.argv[2]), getattr(time, sys.argv[3])
import torch, deepseek
from deepseek.compiled.runner import CompiledRunner
from deepseek.runner import Chunk
torch.set_num_threads(threads)
runner = CompiledRunner(deepseek.load(base).model)
ids = torch.randint(100, 40000, (512,), generator=torch.Generator().manual_seed(0)).tolist()
def turn():
    state = runner.start(None, 600)
    start = clock()
    runner.forward([Chunk(state, ids)])
    prefilled = clock()
    for token in ids[:64]:
        runner.forward([Chunk(state, [token])])
    return {"prefill": 512 / (prefilled - start), "decode": 64 / (clock() - prefilled)}
turn()
print("ready", time.process_time(), flush=True)
for line in sys.stdin:
    print(json.dumps(turn()), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", type=existing_path, nargs="+", metavar="FOLDER")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor", action="store_true", help="measure processor time")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    turns: dict[str, Turn] = {}
    ready: dict[str, float] = {}
    for folder in options.checkouts:
        name = described(folder)
        if name in turns:
            parser.error(f"two folders are checkouts of {name}; commit or change one of them")
        turns[name], ready[name] = side(folder, options)
        print(name, "ready after", round(ready[name], 1), "s of processor time", flush=True)
    rounds = in_turn(turns, options.rounds)
    first = next(iter(rounds.values()))
    figures: dict[str, Any] = {}
    for name, results in rounds.items():
        pairs = list(zip(results, first, strict=True))
        figures[name] = {
            "ready_seconds": ready[name],
            **{kind: median(one[kind] for one in results) for kind in first[0]},
            **{
                f"{kind}_over_first": median(a[kind] / b[kind] for a, b in pairs)
                for kind in first[0]
            },
        }
    print(json.dumps(figures, indent=1))
    if options.json:
        write(options.json, {"figures": figures, "rounds": rounds})


def described(folder: Path) -> str:
    """Return the commit of a checkout, marked if it has uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def side(folder: Path, options: argparse.Namespace) -> tuple[Turn, float]:
    """Return a checkout's turn, and the processor time in seconds until it was ready.

    Raises:
        SystemExit: its process ended early; it has printed the reason.
    """
    clock = "process_time" if options.processor else "perf_counter"
    process = subprocess.Popen(
        [sys.executable, "-c", SIDE, options.base, str(options.threads), clock],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder.resolve())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    _, _, seconds = process.stdout.readline().partition("ready")
    if not seconds:
        raise SystemExit(f"{folder} does not run; see its messages above.")

    def turn() -> dict[str, float]:
        print("go", file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    return turn, float(seconds)


if __name__ == "__main__":
    run_main(main)
