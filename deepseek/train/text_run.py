"""What every training on a user's text shares: request and plan, the corpus, the cached trunk, the way into the loop.

A plan (how many rows, how many passes) is made of minutes and of what is measured on this machine, once: it is kept in
the run folder, so that a resumed run does exactly what the first call set out to do, however fast the machine is then.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepseek.checkpoint.hub import resolve
from deepseek.data import Batch, RowLoader
from deepseek.errors import TrainError
from deepseek.kernels.cross_entropy import CandidateHead
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.corpus import Corpus, Source, build_corpus
from deepseek.train.loop import LoopConfig, Task, TrainResult, train
from deepseek.train.metrics import read_metrics
from deepseek.train.optim import OptimConfig
from deepseek.train.progress import ProgressBar
from deepseek.train.trunk import Stream, TrunkCache

FREQUENT_TOKENS = 4096
"""The first ids of a byte-pair vocabulary are its most frequent ones; they join the candidates of the training loss."""

SAMPLED_TOKENS = 1024
"""Further ids drawn at every step to estimate the rest of the partition function."""


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What to train on; stored as `request.json`.

    Attributes:
        base: name, folder or hub id of the base model.
        source: the text.
        tokens: distinct tokens to train on; 0 means all there are.
        epochs: passes over them.
        row_length, batch_rows: tokens of a packed row, rows of a batch.
        learning_rate: the peak.
        held_out_tokens: most tokens that an evaluation covers.
        seed: of initial values, row order and sampling.
    """

    base: str
    source: Source
    tokens: int | None
    epochs: int
    row_length: int
    batch_rows: int
    learning_rate: float
    held_out_tokens: int
    seed: int

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, those of the source among the others."""
        fields = asdict(self)
        return {**fields, "source": {key: str(v) if isinstance(v, Path) else v for key, v in fields["source"].items()}}


@dataclass(frozen=True)
class Texts:
    """Packed rows to train on and to evaluate on."""

    train: RowLoader
    held_out: RowLoader

    def first(self, rows: int, held_out_rows: int) -> "Texts":
        """Return some of the rows, the same ones at every call."""
        return Texts(self.train.first(rows), self.held_out.first(held_out_rows))


class TextRun:
    """One request in its run folder, and the model that it is about.

    Attributes:
        started: when, by the monotonic clock.
    """

    def __init__(self, request: TextRequest, folder: Path, progress: ProgressBar, dtype: str = "auto") -> None:
        """Load the base model in `dtype`."""
        self.folder, self.progress, self.started = folder, progress, time.monotonic()
        self.base = resolve(request.base)
        self.model = DeepSeekModel.from_pretrained(self.base, dtype=dtype)
        self.tokenizer = load_tokenizer(self.base)
        self._request = request

    def corpus(self) -> Corpus:
        """Return the token shards, reading the source only the first time."""
        corpus = build_corpus(self._request.source, self.tokenizer, self.folder / "corpus", self.progress)
        self.progress.say(corpus.report)
        return corpus

    def texts(self, corpus: Corpus) -> Texts:
        """Return the packed rows of a corpus."""
        rows, length, seed = self._request.batch_rows, self._request.row_length, self._request.seed
        return Texts(RowLoader(corpus.train, rows, length, seed), RowLoader(corpus.held_out, rows, length, seed))

    def head(self, text: RowLoader, *further: Tensor) -> CandidateHead:
        """Return the head restricted to what occurs as a label in the rows of `text` or among `further` labels."""
        labels = torch.cat([*(text.rows([row]).labels.flatten().unique() for row in text.row_ids.tolist()), *further])
        frequent = torch.arange(min(FREQUENT_TOKENS, self.model.config.vocab_size))
        candidates = torch.cat([labels[labels >= 0], frequent]).unique()
        return CandidateHead(self.model.lm_head.weight, candidates, SAMPLED_TOKENS, self._request.seed)

    def cached(
        self, name: str, text: RowLoader, layer: int, compute: Callable[[Batch], Tensor], computed: str,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Stream:  # fmt: skip
        """Return where the streams that enter the trained part come from: a cache, filled by `compute`.

        Args:
            name: of the cache.
            layer: first block of the trained part.
            computed: how the streams are computed, in words that change when they would.
            dtype: of the cache.
        """
        base, width, what = self.model.experts.base.weights, self.model.config.hidden_size, f"trunk ({name})"
        key = {"base": base, "shards": text.shards.digest, "layer": layer, "computed": computed}
        cache = TrunkCache(self.folder / "trunk" / name, key, text.row_ids, text.length, width, dtype)
        cache.fill(text, compute, self._request.batch_rows, lambda done, total: self.progress(done, total, what))
        return lambda batch: cache.read(batch.row_ids)

    def loop(self, task: Task[Batch], text: RowLoader, steps: int, evaluations: int = 2) -> TrainResult:
        """Run the loop to its end; held-out text is scored at the start, at the end and evenly between."""
        config = LoopConfig(
            OptimConfig(learning_rate=self._request.learning_rate), steps=steps, seed=self._request.seed,
            evaluate_every=-(-steps // (evaluations - 1)), checkpoint_every=max(10, steps // 10),
        )  # fmt: skip
        return train(task, text, config, self.folder / "training", progress=self.progress)

    def first_loss(self) -> float:
        """Return the held-out loss before the first step: that of the base."""
        records = read_metrics(self.folder / "training" / "metrics.jsonl")
        return next(record["held_out_loss"] for record in records if "held_out_loss" in record)

    def drop_trunk(self) -> None:
        """Delete the trunk caches, by far the largest part of a run folder."""
        shutil.rmtree(self.folder / "trunk", ignore_errors=True)


T = TypeVar("T")

MARGIN = 0.05
"""Share of the minutes left for what is not measured: checkpoints, plots, the pack."""

EVALUATION_SHARE = 0.15
"""Most of the time that held-out evaluation may take."""

LONG_RUN = 900.0
"""Seconds above which there is time for an evaluation between start and end."""

MAX_EPOCHS = 8
"""Passes after which repeating a small text only teaches it by heart."""


@dataclass(frozen=True)
class Speed:
    """Seconds that one packed row takes.

    Attributes:
        trunk: through the frozen layers below the expert, once a row; 0 where nothing is cached.
        step: forward and backward through the layers above and the head, and the optimizer's part.
        evaluate: forward through the layers above and the whole head.
    """

    trunk: float
    step: float
    evaluate: float


@dataclass(frozen=True)
class Plan:
    """What a run will do; stored as `plan.json`.

    Attributes:
        rows: distinct packed rows to train on.
        held_out_rows: packed rows to evaluate on.
        steps: optimizer steps.
        evaluations: how often the held-out loss is measured, the start and the end included.
        seconds: estimated duration from here.
    """

    rows: int
    held_out_rows: int
    steps: int
    evaluations: int
    seconds: float


def make_plan(request: TextRequest, seconds: float | None, speed: Speed, rows: int, held_out_rows: int) -> Plan:
    """Return how many rows, passes and evaluations fit; raise `TrainError` if not a single step does.

    Args:
        request: how many tokens, or how many of each pass and evaluation.
        seconds: time left for all of it; None: as long as the tokens of the request take.
        rows, held_out_rows: packed rows there are to train on and to evaluate on.
    """
    length, batch_rows = request.row_length, request.batch_rows
    held_out = min(held_out_rows, max(1, request.held_out_tokens // length))
    evaluations = 2 if seconds is None or seconds <= LONG_RUN else 3
    per_held_out = speed.trunk + speed.evaluate * evaluations
    if seconds is None:
        rows = min(rows, -(-request.tokens // length)) if request.tokens else rows
        steps = max(1, round(rows * request.epochs / batch_rows))
    else:
        held_out = max(1, min(held_out, int(EVALUATION_SHARE * seconds / per_held_out)))
        left = (1 - MARGIN) * seconds - held_out * per_held_out
        rows = max(min(int(left / (speed.trunk + request.epochs * speed.step)), rows), 1)
        passes = min((left - rows * speed.trunk) / speed.step, MAX_EPOCHS * rows)
        steps = int(passes / batch_rows)
    if steps < 1:
        raise TrainError(f"{seconds:.0f} seconds do not suffice for one training step here; give more minutes.")
    taken = rows * speed.trunk + steps * batch_rows * speed.step + held_out * per_held_out
    return Plan(rows, held_out, steps, evaluations, round(taken, 1))


def timed(action: Callable[[Batch], T], warm_up: Batch, batch: Batch) -> tuple[float, T]:
    """Return the seconds that `action` takes for each row of `batch`, after a call on `warm_up`, and its result."""
    action(warm_up)
    started = time.perf_counter()
    result = action(batch)
    return (time.perf_counter() - started) / len(batch.row_ids), result
