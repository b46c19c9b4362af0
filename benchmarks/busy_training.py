"""Training speed of an expert while another process occupies a core.

    python benchmarks/busy_training.py FOLDER [--tokens 24000] [--turns 2] [--busy 1] [--json FILE]

Four kinds of training take turns, each in its own process on the same text: alone and beside
`--busy` processes that each occupy a core, with threads that sleep while they wait for one another
(`OMP_WAIT_POLICY=PASSIVE`, which the training commands set) and with threads that spin, the default
unless a program sets the variable before it imports PyTorch. The speed of a run is the median over
its steps, that of a kind the median over its runs. `kept` is the speed beside busy processes as a
share of the speed alone.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from statistics import median

from entry import existing_path, run_main
from results import add_output, write

from deepseek.train.loop.metrics import read_metrics

POLICIES = ("PASSIVE", "ACTIVE")
BUSY = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=existing_path, help="text to train on")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=24_000)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--busy", type=int, default=1, help="processes that take a core each")
    add_output(parser, "busy_training")
    options = parser.parse_args()
    kinds = list(product(POLICIES, (0, options.busy)))
    speeds: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.turns):
        for kind in kinds:
            speeds[kind].append(speed(options, *kind))
            print(*kind, f"{speeds[kind][-1]:,.0f} tokens/s", flush=True)
    figures = {
        policy.lower(): {
            "alone": median(speeds[policy, 0]),
            "busy": median(speeds[policy, options.busy]),
            "kept": median(speeds[policy, options.busy]) / median(speeds[policy, 0]),
        }
        for policy in POLICIES
    }
    print(figures)
    write(options.json, {"busy_processes": options.busy, "figures": figures})


def speed(options: argparse.Namespace, policy: str, busy: int) -> float:
    """Return the median tokens per second over the steps of one training."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for _ in range(busy):
            stack.enter_context(_BusyProcess())
        command = [
            *(sys.executable, "-m", "deepseek", "expert", "train", "--base", options.base),
            *("--name", "busy", "--from-folder", str(options.folder)),
            *("--tokens", str(options.tokens), "--epochs", "2"),
            *("--out", str(folder / "busy.safetensors"), "--run-folder", str(folder / "run")),
        ]
        subprocess.run(
            command, env=os.environ | {"OMP_WAIT_POLICY": policy}, check=True, capture_output=True
        )
        records = read_metrics(folder / "run" / "training" / "metrics.jsonl")
    found = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return median(found)


class _BusyProcess:
    """A process that keeps one core busy while the block runs."""

    def __enter__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", BUSY])

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


if __name__ == "__main__":
    run_main(main)
