"""The stages of one expert training, each kept in the run folder once it is done."""

import shutil
import time
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import read_json, write_json
from deepseek.data import Batch, RowLoader
from deepseek.errors import DataError, PackError
from deepseek.kernels.cross_entropy import CandidateHead
from deepseek.model.experts import ExpertModule
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.manifest import Metric, explain
from deepseek.packs.pack import ExpertPack
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.budget import Dial, Plan, Speed, TextSize, make_plan, timed
from deepseek.train.calibrate import FEWEST_TOKENS, GateCalibration, calibrate
from deepseek.train.corpus import Corpus, Source, build_corpus
from deepseek.train.expert_task import ExpertTask
from deepseek.train.layers import parse_layers
from deepseek.train.loop import LoopConfig, TrainResult, train
from deepseek.train.metrics import read_metrics
from deepseek.train.optim import OptimConfig
from deepseek.train.progress import ProgressBar
from deepseek.train.public import public_statistics
from deepseek.train.replay import Replay
from deepseek.train.rows import ChosenRows
from deepseek.train.trunk import Stream, TrunkCache, TrunkKey, run_trunk

FREQUENT_TOKENS = 4096
"""The first ids of a byte-pair vocabulary are its most frequent ones; they join the candidates of the training loss."""

SAMPLED_TOKENS = 1024
"""Further ids drawn at every step to estimate the rest of the partition function."""

CALIBRATION_TOKENS = 40_000
"""Of the expert's own text, for its gates."""


@dataclass(frozen=True)
class ExpertRequest:
    """What to train; stored as `request.json`.

    Attributes:
        base: name, folder or hub id of the base model.
        name: of the expert.
        source: the text.
        layers: `last:3` (fast), `all` (strong), `last:N`, or indices such as `0-9,20`.
        width: width of the expert's feed-forward network at each layer.
        minutes: time for trunk, training and evaluation, turned into a number of tokens by a measurement.
        tokens: distinct tokens to train on instead; 0 means all there are.
        epochs: passes over them.
        row_length, batch_rows: tokens of a packed row, rows of a batch.
        learning_rate: the peak.
        held_out_tokens: most tokens that an evaluation covers.
        licence: SPDX expression of the pack.
        domain: a few words on what the expert knows.
        seed: of initial values, row order and sampling.
    """

    base: str
    name: str
    source: Source
    layers: str
    width: int
    minutes: float | None
    tokens: int | None
    epochs: int
    row_length: int
    batch_rows: int
    learning_rate: float
    held_out_tokens: int
    licence: str
    domain: str
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


class ExpertRun:
    """One request in its run folder: the base loaded and frozen, the module beside it."""

    def __init__(self, request: ExpertRequest, folder: Path, progress: ProgressBar) -> None:
        self.request, self.folder, self.progress = request, folder, progress
        self.started = time.monotonic()
        base = resolve(request.base)
        self.model = DeepSeekModel.from_pretrained(base, dtype="auto").requires_grad_(False)
        self.tokenizer = load_tokenizer(base)
        layers = parse_layers(request.layers, len(self.model.layers))
        self.first = layers[0]
        self.cached = self.first > 0
        self.module = ExpertModule.beside(
            self.model.layers, request.name, layers, request.width, init=self._init(), seed=request.seed
        )
        self.check_papers()

    def check_papers(self) -> None:
        """Raise `PackError` now, not after hours of training, if the pack could not be made."""
        try:
            self.pack(Metric(before=0.0, after=0.0), data=(), commit=None)
        except ValidationError as error:
            raise PackError(f"The expert's papers are invalid, {explain(error)}.") from None

    def pack(self, held_out: Metric, data: tuple[str, ...], commit: str | None) -> ExpertPack:
        """Return the module as a pack."""
        base, request = self.model.experts.base, self.request
        metrics = {"held-out": held_out}
        return self.module.to_pack(
            base, request.licence, domain=request.domain, data=data, commit=commit, metrics=metrics
        )

    def corpus(self) -> Corpus:
        """Return the token shards, reading the source only the first time."""
        corpus = build_corpus(self.request.source, self.tokenizer, self.folder / "corpus", self.progress)
        self.progress.say(corpus.report)
        return corpus

    def texts(self, corpus: Corpus) -> Texts:
        """Return the packed rows of a corpus; raise `DataError` if they are too few to ever make an expert of."""
        shortest = min(corpus.train.num_tokens, corpus.held_out.num_tokens)
        if shortest < FEWEST_TOKENS:
            raise DataError(
                f"There are {corpus.train.num_tokens} tokens to train on and {corpus.held_out.num_tokens} held out; at "
                f"least {FEWEST_TOKENS} of each are needed, so give more text."
            )
        rows, length, seed = self.request.batch_rows, self.request.row_length, self.request.seed
        return Texts(RowLoader(corpus.train, rows, length, seed), RowLoader(corpus.held_out, rows, length, seed))

    def plan(self, texts: Texts) -> Plan:
        """Return the plan of this run, measuring and storing it the first time."""
        path = self.folder / "plan.json"
        if not path.is_file():
            speed = self.measure(texts)
            write_json(path, {"plan": asdict(self.plan_for(texts, speed)), "speed": asdict(speed)})
        return Plan(**read_json(path)["plan"])

    def plan_for(self, texts: Texts, speed: Speed) -> Plan:
        """Fit the work to the minutes that are left at this speed, or estimate the time of the tokens."""
        request = self.request
        left = None if request.minutes is None else request.minutes * 60 - (time.monotonic() - self.started)
        dial = Dial(left, request.tokens, request.epochs, request.batch_rows, request.held_out_tokens)
        size = TextSize(texts.train.num_rows, texts.held_out.num_rows, request.row_length)
        return make_plan(dial, speed, size)

    def measure(self, texts: Texts) -> Speed:
        """Time one batch through trunk, training step and evaluation; gradients are thrown away."""
        chosen = texts.train.order(0, self.request.batch_rows)
        warm_up, batch = texts.train.rows(chosen[:1]), texts.train.rows(chosen)
        stream: Stream = partial(run_trunk, self.model, self.first)
        seconds = 0.0
        if self.cached:
            seconds, kept_BTD = timed(stream, warm_up, batch)
            stream = lambda rows: kept_BTD[: len(rows.row_ids)]  # noqa: E731
        task = self.task(texts, chosen, stream, [], stream)
        step, _ = timed(lambda rows: task.loss(rows, 0).loss.backward(), warm_up, batch)
        self.module.zero_grad()
        evaluate, _ = timed(lambda rows: task.score(rows, stream(rows)), warm_up, batch)
        return Speed(seconds, step, evaluate)

    def train(self, texts: Texts, plan: Plan, resume: str) -> TrainResult:
        """Fill the trunk cache and run the loop to its end."""
        request = self.request
        chosen = texts.train.order(0, plan.rows)
        held_out = texts.held_out.order(0, plan.held_out_rows)
        stream, held_out_stream = self.streams(texts, plan)
        task = self.task(texts, chosen, stream, self.batches(texts.held_out, held_out), held_out_stream)
        config = LoopConfig(
            OptimConfig(learning_rate=request.learning_rate),
            steps=plan.steps,
            evaluate_every=-(-plan.steps // (plan.evaluations - 1)),
            checkpoint_every=max(10, plan.steps // 10),
            seed=request.seed,
        )
        rows = ChosenRows(texts.train, chosen, request.batch_rows, request.seed)
        return train(task, rows, config, self.folder / "training", progress=self.progress, resume=resume)

    def calibrate(self, texts: Texts, plan: Plan) -> GateCalibration:
        """Solve the gates of the trained module from some of its own text and the base's public text."""
        layers = self.module.layers
        public = public_statistics(self.model, self.tokenizer, layers, progress=self.progress)
        own = texts.train.order(0, min(plan.rows, max(1, CALIBRATION_TOKENS // texts.train.length)))
        held_out = self.batches(texts.held_out, texts.held_out.order(0, plan.held_out_rows))
        streams = self.streams(texts, plan)
        return calibrate(self.model, self.module, self.batches(texts.train, own), held_out, public, streams=streams)

    def streams(self, texts: Texts, plan: Plan) -> tuple[Stream, Stream]:
        """Return where the streams of the rows to train on and to evaluate on come from."""
        return (
            self.stream(texts.train, texts.train.order(0, plan.rows), torch.bfloat16, "train"),
            self.stream(texts.held_out, texts.held_out.order(0, plan.held_out_rows), self.model.dtype, "held-out"),
        )

    def batches(self, loader: RowLoader, rows: NDArray[np.int64]) -> list[Batch]:
        """Return these rows in batches, the last perhaps smaller."""
        size = self.request.batch_rows
        return [loader.rows(rows[start : start + size]) for start in range(0, len(rows), size)]

    def task(
        self, texts: Texts, chosen: NDArray[np.int64], stream: Stream, held_out: list[Batch], held_out_stream: Stream
    ) -> ExpertTask:
        """Return the task, its head restricted to what occurs as a label in the chosen rows."""
        labels = torch.cat([texts.train.rows([row]).labels.flatten().unique() for row in chosen.tolist()])
        frequent = torch.arange(min(FREQUENT_TOKENS, self.model.config.vocab_size))
        replayed = self.replay.rows.labels.flatten()
        candidates = torch.cat([labels[labels >= 0], replayed[replayed >= 0], frequent]).unique()
        head = CandidateHead(self.model.lm_head.weight, candidates, SAMPLED_TOKENS, self.request.seed)
        return ExpertTask(
            self.model, self.module, head, stream=stream, held_out=held_out, held_out_stream=held_out_stream,
            replay=self.replay,
        )  # fmt: skip

    @cached_property
    def replay(self) -> Replay:
        """Public text to train on beside the expert's own; making it, once a base, is not counted in the minutes."""
        before = time.monotonic()
        tokens = self.request.batch_rows * self.request.row_length
        replay = Replay.beside(self.model, self.tokenizer, self.first, tokens, self.progress)
        self.started += time.monotonic() - before
        return replay

    def stream(self, loader: RowLoader, rows: NDArray[np.int64], dtype: torch.dtype, name: str) -> Stream:
        """Return where the streams of these rows come from: a filled cache, or the trunk itself if nothing is below."""
        compute = partial(run_trunk, self.model, self.first)
        if not self.cached:
            return compute
        key = TrunkKey(
            base=self.model.experts.base.weights, shards=loader.shards.digest, layer=self.first, length=loader.length,
            width=self.model.config.hidden_size, computed=str(self.model.dtype), stored=str(dtype),
        )  # fmt: skip
        cache = TrunkCache(self.folder / "trunk" / name, key, rows, dtype)
        what = f"trunk ({name})"
        cache.fill(loader, compute, self.request.batch_rows, lambda done, total: self.progress(done, total, what))
        return lambda batch: cache.read(batch.row_ids)

    def first_loss(self) -> float:
        """Return the held-out loss before the first step, when the module still adds nothing: that of the base."""
        records = read_metrics(self.folder / "training" / "metrics.jsonl")
        return next(record["held_out_loss"] for record in records if "held_out_loss" in record)

    def drop_trunk(self) -> None:
        """Delete the trunk caches, by far the largest part of a run folder."""
        shutil.rmtree(self.folder / "trunk", ignore_errors=True)

    def _init(self) -> Any:
        """Return "base" where the base's own feed-forward networks are wide enough to copy rows from, else "normal"."""
        config = self.model.config
        dense = config.num_experts == 0 and self.request.width <= config.intermediate_size
        return "base" if dense else "normal"
