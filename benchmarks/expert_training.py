"""Train an expert on a code base within a time limit, and measure its gain on held-out files and
its training speed.

    python benchmarks/expert_training.py FOLDER [--layers last:3] [--minutes 5] [--json benchmarks/results/FILE.json]

The training runs in one process. `seconds` counts reading, cleaning, planning, trunk cache,
training and evaluation, as `--minutes` does; `seconds_with_gates` is the wall time of the whole
process. Then the pack is loaded into a fresh base and scored on `--check` held-out tokens, with the
exact loss and without the trunk cache. The training speed without a trunk cache is measured too:
the same loop on the same rows for a few steps, with the trunk recomputed at every step.
`benchmarks/corpora.py code-a` fetches a code base.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from entry import existing_path, run_main
from results import write

from deepseek.data import RowLoader, TokenShards
from deepseek.engine.load import load
from deepseek.model.experts import ExpertModule
from deepseek.packs.pack import read_pack
from deepseek.train.jobs.expert import ExpertRun
from deepseek.train.jobs.expert_request import ExpertRequest
from deepseek.train.jobs.plan import TrainingPlan
from deepseek.train.loop.losses import held_out_loss
from deepseek.train.loop.metrics import read_metrics
from deepseek.train.loop.progress import ProgressBar

PATHS = ("git", "folder", "jsonl", "parquet")
UNCACHED_STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=existing_path)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--layers", default="last:3")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument(
        "--check", type=int, default=16384, help="held-out tokens scored afterwards; 0: none"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options, dials = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        pack, run = Path(folder) / "bench.safetensors", Path(folder) / "run"
        seconds = train(options, dials, pack, run)
        figures = {"seconds_with_gates": round(seconds, 1)} | run_figures(run) | speeds(run)
        if options.check:
            figures |= check(options.base, pack, run, options.check)
    for name, value in figures.items():
        print(f"{name:32} {value}")
    if options.json:
        write(options.json, {"figures": figures})


def train(options: argparse.Namespace, dials: list[str], pack: Path, run: Path) -> float:
    """Train in a separate process and return its wall time in seconds."""
    command = [
        sys.executable,
        "-m",
        "deepseek",
        "expert",
        "train",
        "--name",
        "bench",
        "--base",
        options.base,
        "--from-folder",
        str(options.folder),
        "--layers",
        options.layers,
        "--minutes",
        str(options.minutes),
        "--out",
        str(pack),
        "--run-folder",
        str(run),
        *dials,
    ]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def run_figures(run: Path) -> dict[str, Any]:
    """Return the figures that the run recorded."""
    result, plan = (
        json.loads((run / "result.json").read_text()),
        json.loads((run / "plan.json").read_text()),
    )
    return {
        "seconds": round(result["seconds"], 1),
        "held_out_before": round(result["before"], 4),
        "held_out_after": round(result["after"], 4),
        "held_out_change_percent": round(100 * (result["after"] / result["before"] - 1), 2),
        "peak_memory_gb": round(result["peak_memory"] / 1e9, 2),
        "distinct_rows": plan["plan"]["rows"],
        "steps": plan["plan"]["steps"],
        "targets_seen": result["tokens"],
    }


def speeds(run: Path) -> dict[str, Any]:
    """Return the training speed with and without the trunk cache (medians over steps), and their
    ratio.
    """
    cached = tokens_per_second(run)
    with tempfile.TemporaryDirectory() as folder:
        uncached = tokens_per_second(train_uncached(run, Path(folder)))
    figures = {"tokens_per_second": round(cached), "tokens_per_second_uncached": round(uncached)}
    return figures | {"trunk_cache_speedup": round(cached / uncached, 2)}


def tokens_per_second(run: Path) -> float:
    """Return the median tokens per second over the steps of a run."""
    records = read_metrics(run / "training" / "metrics.jsonl")
    return median(
        record["tokens_per_second"] for record in records if "tokens_per_second" in record
    )


def train_uncached(run: Path, folder: Path) -> Path:
    """Train `UNCACHED_STEPS` steps of the run's request again, without a trunk cache; return the
    folder.
    """
    shutil.copytree(run / "corpus", folder / "corpus")
    stored = json.loads((run / "request.json").read_text())
    source = stored.pop("source")
    paths = {f"from_{kind}": source[kind] for kind in PATHS}
    text = {"held_out": source["held_out"], "split": source["by"], "questions": source["questions"]}
    request = ExpertRequest(**stored, **paths, **text)
    expert = ExpertRun(request, folder, folder / "pack.safetensors", ProgressBar())
    expert.cached_below = False
    texts = expert.texts(expert.corpus())
    plan = TrainingPlan(**json.loads((run / "plan.json").read_text())["plan"])
    expert.train(
        texts,
        replace(plan, steps=UNCACHED_STEPS, evaluations=2, validation_rows=1, held_out_rows=1),
    )
    return folder


def check(base: str, pack: Path, run: Path, tokens: int) -> dict[str, Any]:
    """Score the base and the written pack on held-out rows with the whole model."""
    model = load(base).model
    request = json.loads((run / "request.json").read_text())
    loader = RowLoader(TokenShards(run / "corpus" / "held-out"), 4, request["row_length"], seed=1)
    rows = loader.order(0, min(loader.num_rows, tokens // loader.length))
    batches = [loader.rows(rows[i : i + 4]) for i in range(0, len(rows), 4)]
    before = held_out_loss(model, batches)
    with model.experts.forced(ExpertModule.from_pack(read_pack(pack), model.dtype)):
        after = held_out_loss(model, batches)
    return {
        "check_tokens": before.tokens,
        "check_before": round(before.loss, 4),
        "check_after": round(after.loss, 4),
        "check_change_percent": round(100 * (after.loss / before.loss - 1), 2),
    }


if __name__ == "__main__":
    run_main(main)
