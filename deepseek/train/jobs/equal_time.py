"""LoRA or full fine-tuning on an expert's text, within the time that the expert took."""

import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from deepseek.checkpoint.store import read_json, write_json
from deepseek.data import Batch
from deepseek.device.names import Dtype
from deepseek.train.jobs.adapt import (
    BATCH_ROWS,
    LEARNING_RATES,
    TASKS,
    AdaptRequest,
    AdaptRun,
    adapt_request,
)
from deepseek.train.jobs.arguments import AdaptArguments
from deepseek.train.jobs.plan import MOST_PASSES, VALIDATION_ROWS, timed
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.loop.runs import Run, run_once

Rival = Literal["lora", "full"]

EVALUATION_COST = 1 / 3
"""Cost of scoring a row relative to a training step: a forward pass without a backward one."""


EARLY = 0.9
"""Share of the planned tokens below which a training has stopped early."""


@dataclass(frozen=True)
class Effort:
    """Amount of training that fits into the time: distinct tokens, and passes over them."""

    tokens: int
    epochs: int


def adapt_for_equal_time(
    run: Path,
    mode: Rival,
    folder: Path,
    quiet: bool = False,
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
) -> Path:
    """Train a model by `mode` in the time that an expert's run took, and return its folder.

    The same call resumes a run.

    Args:
        run: run folder of a finished expert; its corpus and duration are used.
        mode: "lora" or "full".
        folder: run folder of this training; the model goes to its subfolder `model`.
        quiet: show no progress.
        device: where to train; take the expert's, as its time is the budget.
        dtype: precision of the training.
    """
    request = read_json(run / "request.json")
    shared = {name: request[name] for name in ("base", "row_length", "held_out_tokens", "seed")}
    shared |= {"device": device, "dtype": dtype}
    if not (folder / "corpus").is_dir():
        copied = folder / "corpus.partial"
        shutil.rmtree(copied, ignore_errors=True)  # of a process that was killed
        shutil.copytree(run / "corpus", copied)
        copied.rename(folder / "corpus")
    plan = folder / "effort.json"
    if not plan.is_file():
        seconds = read_json(run / "result.json")["seconds"]
        write_json(plan, asdict(measure(mode, folder, seconds, shared)))
    effort = Effort(**read_json(plan))
    source = request["source"]
    text = {f"from_{kind}": source[kind] for kind in ("git", "folder", "jsonl", "parquet")}
    text["held_out"] = source["held_out"]
    options = {**asdict(effort), **shared, **text}
    arguments = AdaptArguments(name=run.name, mode=mode, quiet=quiet, **options)
    request = adapt_request(arguments)
    model = folder / "model"
    # Without digests of the inputs: the text is that of the expert's run, whatever its source
    # holds now.
    return run_once(AdaptRun, request, Run(request.as_json(), model, folder, quiet, dry_run=False))


def drop_resume_state(folder: Path) -> None:
    """Delete what only a resumed training reads: checkpoints, best states and the elapsed time,
    which a training from the start must not count.

    Args:
        folder: run folder of a rival. Without its model, nothing is deleted: a training that writes
            the model again needs all of it.
    """
    if not (folder / "model").is_dir():
        return
    for states in ("checkpoints", "best"):
        shutil.rmtree(folder / "training" / states, ignore_errors=True)
    (folder / "elapsed.json").unlink(missing_ok=True)


def shorter_because(folder: Path) -> str:
    """Return why a finished training took less than its time, as a phrase to put after a colon.

    Args:
        folder: run folder of a rival.
    """
    effort = Effort(**read_json(folder / "effort.json"))
    learnt = read_json(folder / "result.json")["figures"]["tokens"]
    if learnt < EARLY * effort.tokens * effort.epochs:
        return "its held-out loss had stopped falling"
    if effort.epochs == int(MOST_PASSES):
        return f"it had {effort.epochs} passes over the text, and more would teach it by heart"
    return (
        f"the machine was busy when it was planned; remove {folder} and run the same command again"
    )


def measure(mode: Rival, folder: Path, seconds: float, shared: dict[str, Any]) -> Effort:
    """Time a step of `mode` on the corpus in `folder` and return the effort that fits into
    `seconds`.

    Loading the model counts against the seconds, and so do all evaluations: the held-out rows
    before and after, and the validation rows between.
    """
    started = time.monotonic()
    rate = LEARNING_RATES[mode]
    request = AdaptRequest(mode=mode, learning_rate=rate, epochs=1, batch_rows=BATCH_ROWS, **shared)
    with tempfile.TemporaryDirectory() as empty:
        run = AdaptRun(request, folder, Path(empty) / "model", ProgressBar(quiet=True))
        texts = run.texts(run.corpus())
        sample = texts.first(request.batch_rows, 1, 1)
        task, _ = TASKS[mode](run, sample)
        loading = time.monotonic() - started
        batch = sample.train.rows(sample.train.row_ids)

        def step(rows: Batch) -> None:
            task.loss(rows, 0).loss.backward()

        row_seconds, _ = timed(step, batch, batch, run.device)
    reported = min(
        len(texts.held_out.row_ids), max(1, request.held_out_tokens // request.row_length)
    )
    budget = for_training(seconds - loading, row_seconds, reported)
    return fit(budget, row_seconds, texts.counts.train, request.row_length)


def for_training(seconds: float, row_seconds: float, reported: int) -> float:
    """Return the seconds of training steps in a run that takes `seconds` with its evaluations.

    Args:
        seconds: time budget.
        row_seconds: seconds per row of a training step.
        reported: held-out rows, which are scored before and after.
    """
    left = seconds - 2 * reported * row_seconds * EVALUATION_COST
    return left / (1 + VALIDATION_ROWS * EVALUATION_COST)


def fit(seconds: float, row_seconds: float, rows: int, row_length: int) -> Effort:
    """Return the tokens and passes that fit into `seconds`, at least one row.

    Args:
        seconds: time budget of the training steps alone.
        row_seconds: seconds per row.
        rows: available rows.
        row_length: tokens per row.
    """
    steps = max(1, int(seconds / row_seconds))
    epochs = min(int(MOST_PASSES), max(1, -(-steps // rows)))
    return Effort(max(1, min(rows, steps // epochs)) * row_length, epochs)
