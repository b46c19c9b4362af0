"""Claims that follow from formulas alone: the article's learning rate schedule, and the planner's
figures for its two large models.

    python benchmarks/formulas.py [--json FILE]

`schedule` compares the rate of every step of the training loop with the article's cosine from 3e-4
to 1e-5, over 300 billion tokens at 4 million per step. `scaling` and `8b` come from `deepseek
plan`.
"""

import argparse
import json
import math
import subprocess
import sys
from typing import Any

from entry import run_main
from results import add_output, write

from deepseek.train.loop.optim import OptimConfig, learning_rate

PEAK, FINAL, TOKENS, STEP_TOKENS = 3e-4, 1e-5, 300e9, 4e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_output(parser, "formulas")
    options = parser.parse_args()
    large = plan("deepseek-175b", "--gpus", "256", "--device", "h200")
    small = plan("--inference", "deepseek-8b", "--bits", "8", "--memory", "12")
    figures = {
        "schedule": schedule(),
        "scaling": {row["gpus"]: row["efficiency"] for row in large["scaling"]},
        "planned_tokens": large["tokens"],
        "8b": {"fits": small["fits"], "gigabytes": sum(small["memory"].values()) / 1e9},
    }
    print(json.dumps(figures, indent=1))
    write(options.json, figures)


def schedule() -> dict[str, float]:
    """Return the largest relative difference from the article's rates, and both ends."""
    steps = round(TOKENS / STEP_TOKENS)
    config = OptimConfig(PEAK, warmup=0.0, final=FINAL / PEAK)
    ours = [learning_rate(config, step, steps) for step in range(1, steps)]
    # The first step of a run is always its warm-up, at the peak; the cosine begins after it.
    share = [step / (len(ours) - 1) for step in range(len(ours))]
    article = [FINAL + (PEAK - FINAL) * (1 + math.cos(math.pi * one)) / 2 for one in share]
    worst = max(abs(mine / theirs - 1) for mine, theirs in zip(ours, article, strict=True))
    return {"steps": steps, "worst": worst, "first": ours[0], "last": ours[-1]}


def plan(*words: str) -> dict[str, Any]:
    """Return what `deepseek plan` prints as JSON."""
    command = [sys.executable, "-m", "deepseek", "plan", *words, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    run_main(main)
