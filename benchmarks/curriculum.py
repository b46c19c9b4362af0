"""How many training steps a curriculum (easy text first) saves, on the same tokens, over several
seeds.

    python benchmarks/curriculum.py CORPORA [--tokens 200000] [--seeds 3] [--json benchmarks/results/curriculum.json]

For each seed, a small dense model is trained twice on the same shards, with the curriculum on and
off. `goal` is the final held-out loss of the run without it; `saved` is the share by which the
curriculum reduces the steps until that loss is first reached, interpolated on both held-out curves
(negative: it needs more).
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from entry import existing_path, run_main
from results import write

import deepseek
from deepseek.train.loop.metrics import read_metrics

DOMAINS = {"public-code": 1, "prose": 1, "science": 1}
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", type=existing_path)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as name:
        for seed in range(options.seeds):
            curves = {
                on: curve(options.corpora, options.tokens, seed, on, Path(name) / f"{seed}-{on}")
                for on in (False, True)
            }
            (steps, without), (_, with_it) = curves[False], curves[True]
            goal = without[-1]
            saved = 1 - first_step(goal, steps, with_it) / first_step(goal, steps, without)
            runs.append({"seed": seed, "goal": goal, "with": with_it[-1], "saved": saved})
            print(runs[-1], flush=True)
    figures: dict[str, Any] = {
        "runs": runs,
        "final_difference": mean(r["with"] - r["goal"] for r in runs),
    }
    print(figures["final_difference"])
    if options.json:
        write(options.json, {"figures": figures})


def first_step(goal: float, steps: list[int], losses: list[float]) -> float:
    """Return the step at which a curve first falls to a loss; infinity if it never does."""
    best = np.minimum.accumulate(losses)
    return float(np.interp(-goal, -best, steps)) if best[-1] <= goal else float("inf")


def curve(
    corpora: Path, tokens: int, seed: int, on: bool, folder: Path
) -> tuple[list[int], list[float]]:
    """Return steps and held-out losses of one training."""
    settings = {
        "name": "ab",
        "tokens": tokens,
        "row_length": 128,
        "batch_rows": 16,
        "learning_rate": 2e-3,
        "vocab_size": 4096,
        "domains": {n: {"folder": str(corpora / n), "weight": w} for n, w in DOMAINS.items()},
        "model": MODEL,
        "curriculum": on,
        "seed": seed,
        "evaluate_every": 10,
        "checkpoint_every": 10_000,
        "held_out_tokens": 4096,
        "samples": [],
        "out": str(folder / "model"),
        "run_folder": str(folder / "run"),
    }
    deepseek.pretrain(settings, quiet=True)
    records = read_metrics(folder / "run" / "training" / "metrics.jsonl")
    points = [(int(r["step"]), r["held_out_loss"]) for r in records if "held_out_loss" in r]
    return [step for step, _ in points], [loss for _, loss in points]


if __name__ == "__main__":
    run_main(main)
