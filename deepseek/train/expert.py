"""`deepseek.train_expert`: from a pile of text to an expert pack, the base untouched.

documents -> clean -> split -> token shards -> plan -> trunk cache -> train -> calibrate the gates -> pack

Each stage is kept in the run folder once it is done.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home, read_json, write_json
from deepseek.data import Batch, RowLoader
from deepseek.data.document import Rule
from deepseek.errors import DataError, PackError
from deepseek.kernels.cross_entropy import IGNORED_LABEL, CandidateHead, token_losses
from deepseek.model.experts import ExpertModule
from deepseek.model.pretrained import read_config
from deepseek.packs.library import SUFFIX, experts_folder
from deepseek.packs.manifest import Metric, explain
from deepseek.packs.pack import ExpertPack, write_pack
from deepseek.train.calibrate import FEWEST_TOKENS, GateCalibration, calibrate
from deepseek.train.corpus import Corpus, Source
from deepseek.train.layers import parse_layers
from deepseek.train.loop import LossOutput, TrainResult
from deepseek.train.losses import autocast, mean_loss
from deepseek.train.metrics import peak_memory
from deepseek.train.progress import ProgressBar
from deepseek.train.public import public_statistics
from deepseek.train.question_mix import QUESTIONS
from deepseek.train.replay import Replay
from deepseek.train.runs import run_once
from deepseek.train.text_run import Plan, Speed, TextRequest, TextRun, Texts, make_plan, timed
from deepseek.train.trunk import Stream, run_above, run_trunk


class ExpertTask:
    """The module forced on at every token; everything else of the model frozen.

    Attributes:
        parameters: those of the module.
    """

    def __init__(
        self,
        model: Any,
        module: ExpertModule,
        head: CandidateHead,
        *,
        stream: Stream,
        held_out: Sequence[Batch],
        held_out_stream: Stream,
        replay: Replay | None = None,
    ) -> None:
        """Train `module` on what `stream` gives and some `replay`, scored by `head`; `held_out` is scored exactly."""
        self.model, self.module, self.head, self.stream, self.replay = model, module, head, stream, replay
        self.held_out, self.held_out_stream = held_out, held_out_stream
        self.layer = module.layers[0]
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())

    def loss(self, batch: Batch, step: int) -> LossOutput:
        """Return the loss of one batch of packed rows and of the step's replay; `tokens` counts the batch's own."""
        parts = [(batch, self.stream(batch))]
        if self.replay is not None:
            parts.append(self.replay.at(step))
        hidden_ND = torch.cat([self.hidden(rows, stream_BTD).flatten(0, 1) for rows, stream_BTD in parts])
        labels_N = torch.cat([rows.labels.flatten() for rows, _ in parts])
        return LossOutput(self.head.loss(hidden_ND, labels_N, step), int((batch.labels != IGNORED_LABEL).sum()))

    def evaluate(self) -> dict[str, float]:
        """Return the exact loss on held-out rows with the module on."""
        parts = ((self.score(rows, self.held_out_stream(rows)), rows.labels.flatten()) for rows in self.held_out)
        return {"held_out_loss": mean_loss(parts).loss}

    @torch.no_grad()
    def score(self, batch: Batch, stream_BTD: Tensor) -> Tensor:
        """Return the exact loss `[N]` of every token of a batch, 0 where ignored."""
        hidden_ND = self.hidden(batch, stream_BTD).flatten(0, 1)
        return token_losses(hidden_ND, self.model.lm_head.weight, batch.labels.flatten())

    def hidden(self, batch: Batch, stream_BTD: Tensor) -> Tensor:
        """Return the normed last hidden states `[B, T, D]` with the module forced on."""
        with self.model.experts.forced(self.module), autocast(self.model.device):
            return run_above(self.model, self.layer, batch, stream_BTD.to(self.model.device, self.model.dtype))


CALIBRATION_TOKENS = 40_000
"""Of the expert's own text, for its gates."""


@dataclass(frozen=True, kw_only=True)
class ExpertRequest(TextRequest):
    """What to train.

    Attributes:
        name: of the expert.
        layers: `last:3` (fast), `all` (strong), `last:N`, or indices such as `0-9,20`.
        width: width of the expert's feed-forward network at each layer.
        minutes: time for trunk, training and evaluation, turned into a number of tokens by a measurement; or None, and
            `tokens` counts.
        licence: SPDX expression of the pack.
        domain: a few words on what the expert knows.
    """

    name: str
    layers: str
    width: int
    minutes: float | None
    licence: str
    domain: str


class ExpertRun(TextRun):
    """One request in its run folder: the base loaded and frozen, the module beside it."""

    def __init__(self, request: ExpertRequest, folder: Path, out: Path, progress: ProgressBar) -> None:
        super().__init__(request, folder, progress)
        self.request, self.out = request, out
        self.model.requires_grad_(False)
        layers = parse_layers(request.layers, len(self.model.layers))
        self.first = layers[0]
        self.cached_below = self.first > 0
        self.module = ExpertModule.beside(self.model.layers, request.name, layers, request.width, seed=request.seed)
        self.check_papers()

    def run(self) -> dict[str, Any]:
        """Go through all stages to the pack; return the figures of the run."""
        corpus = self.corpus()
        texts = self.texts(corpus)
        write_json(self.folder / "request.json", self.request.as_json())
        plan = self.plan(texts)
        result = self.train(texts, plan)
        seconds = time.monotonic() - self.started  # of this call, as the minutes are counted: without the gates
        self.progress.say("calibrating the gates")
        gates = self.calibrate(texts, plan)
        held_out = Metric(before=self.first_loss(), after=result.metrics["held_out_loss"])
        write_pack(self.out, self.pack(held_out, (corpus.train.digest,), corpus.commit))
        self.drop_trunk()
        change = held_out.after / held_out.before - 1
        self.progress.say(
            f"held-out loss {held_out.before:.4f} -> {held_out.after:.4f} ({change:+.1%}), recall {gates.recall:.1%}, "
            f"false positives {gates.false_positives:.1%}, peak memory {peak_memory() / 1e9:.1f} GB, {self.out}"
        )
        figures = {"plan": asdict(plan), "gates": asdict(gates), "peak_memory": peak_memory(), **held_out.model_dump()}
        return {"pack": str(self.out), "seconds": seconds, **asdict(result.position), **figures}

    def estimate(self) -> str:
        """Measure what a run would take."""
        texts = self.texts(self.corpus())
        plan, request = self.plan_for(texts, self.measure(texts)), self.request
        row_bytes = request.row_length * self.model.config.hidden_size
        cache = (plan.rows * 2 + plan.held_out_rows * self.model.dtype.itemsize) * row_bytes if self.cached_below else 0
        pack = sum(parameter.numel() * 2 for parameter in self.module.parameters())
        return (
            f"{plan.rows * request.row_length:,} tokens in {plan.steps} steps, about {plan.seconds / 60:.1f} minutes; "
            f"memory {peak_memory() / 1e9:.1f} GB, trunk cache {cache / 1e6:,.0f} MB, pack {pack / 1e6:,.0f} MB"
        )

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

    def texts(self, corpus: Corpus) -> Texts:
        """Return the packed rows of a corpus; raise `DataError` if they are too few to ever make an expert of."""
        shortest = min(corpus.train.num_tokens, corpus.held_out.num_tokens)
        if shortest < FEWEST_TOKENS:
            raise DataError(
                f"There are {corpus.train.num_tokens} tokens to train on and {corpus.held_out.num_tokens} held out; at "
                f"least {FEWEST_TOKENS} of each are needed, so give more text."
            )
        return super().texts(corpus)

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
        return make_plan(request, left, speed, texts.train.num_rows, texts.held_out.num_rows)

    def measure(self, texts: Texts) -> Speed:
        """Time one batch through trunk, training step and evaluation; gradients are thrown away."""
        text = texts.train.first(self.request.batch_rows)
        warm_up, batch = text.rows(text.row_ids[:1]), text.rows(text.row_ids)
        stream: Stream = partial(run_trunk, self.model, self.first)
        seconds = 0.0
        if self.cached_below:
            seconds, kept_BTD = timed(stream, warm_up, batch)
            stream = lambda rows: kept_BTD[: len(rows.row_ids)]  # noqa: E731
        task = self.task(text, [], (stream, stream))
        step, _ = timed(lambda rows: task.loss(rows, 0).loss.backward(), warm_up, batch)
        self.module.zero_grad()
        evaluate, _ = timed(lambda rows: task.score(rows, stream(rows)), warm_up, batch)
        return Speed(seconds, step, evaluate)

    def train(self, texts: Texts, plan: Plan) -> TrainResult:
        """Fill the trunk cache and run the loop to its end."""
        texts = texts.first(plan.rows, plan.held_out_rows)
        task = self.task(texts.train, texts.held_out.batches(), self.streams(texts))
        return self.loop(task, texts.train, plan.steps, plan.evaluations)

    def calibrate(self, texts: Texts, plan: Plan) -> GateCalibration:
        """Solve the gates of the trained module from some of its own text and the base's public text."""
        public = public_statistics(self.model, self.tokenizer, self.module.layers, progress=self.progress)
        streams = self.streams(texts.first(plan.rows, plan.held_out_rows))
        texts = texts.first(min(plan.rows, max(1, CALIBRATION_TOKENS // texts.train.length)), plan.held_out_rows)
        own, held_out = texts.train.batches(), texts.held_out.batches()
        return calibrate(self.model, self.module, own, held_out, public, streams=streams)

    def streams(self, texts: Texts) -> tuple[Stream, Stream]:
        """Return where the streams of the rows to train on and to evaluate on come from; nothing is below layer 0."""
        compute, dtype = partial(run_trunk, self.model, self.first), self.model.dtype
        if not self.cached_below:
            return compute, compute
        return (
            self.cached("train", texts.train, self.first, compute, str(dtype)),
            self.cached("held-out", texts.held_out, self.first, compute, str(dtype), dtype),
        )

    def task(self, text: RowLoader, held_out: list[Batch], streams: tuple[Stream, Stream]) -> ExpertTask:
        """Return the task, its head restricted to what occurs as a label in the rows to train on."""
        return ExpertTask(
            self.model, self.module, self.head(text, self.replay.rows.labels.flatten()), stream=streams[0],
            held_out=held_out, held_out_stream=streams[1], replay=self.replay,
        )  # fmt: skip

    @cached_property
    def replay(self) -> Replay:
        """Public text to train on beside the expert's own; making it, once a base, is not counted in the minutes."""
        before = time.monotonic()
        tokens = self.request.batch_rows * self.request.row_length
        replay = Replay.beside(self.model, self.tokenizer, self.first, tokens, self.progress)
        self.started += time.monotonic() - before
        return replay


DEFAULT_MINUTES = 5.0


@dataclass(frozen=True)
class Recipe:
    """Dials that a user need not know; measured, see LOG.md.

    Attributes:
        width: of the expert's feed-forward networks.
        epochs: passes over the text.
        batch_rows: rows a step; small, as steps are what is scarce.
        learning_rate: the peak.
    """

    width: int
    epochs: int
    batch_rows: int
    learning_rate: float


CACHED = Recipe(width=512, epochs=3, batch_rows=4, learning_rate=4e-3)
"""With a trunk cache: further passes are cheap."""

WHOLE = Recipe(width=256, epochs=1, batch_rows=2, learning_rate=3e-3)
"""Experts from layer 0 on: every pass costs the same, so new text at each."""

TextPath = str | Path | None


def train_expert(
    base: str = "smollm2-135m",
    *,
    name: str,
    from_git: TextPath = None,
    from_folder: TextPath = None,
    from_jsonl: TextPath = None,
    from_parquet: TextPath = None,
    layers: str = "last:3",
    width: int | None = None,
    minutes: float | None = None,
    tokens: int | None = None,
    epochs: int | None = None,
    out: str | Path | None = None,
    run_folder: str | Path | None = None,
    held_out: float = 0.1,
    split: Rule = "file",
    row_length: int = 512,
    batch_rows: int | None = None,
    learning_rate: float | None = None,
    held_out_tokens: int = 8192,
    questions: float | None = None,
    licence: str = "LicenseRef-Unknown",
    domain: str = "",
    seed: int = 0,
    quiet: bool = False,
    dry_run: bool = False,
) -> Path:
    """Train an expert module on text and return the path of its pack; interrupted, the same call goes on.

    Args:
        out: path of the pack; default `<name>.safetensors` in the folder of trained experts.
        run_folder: default `runs/<name>` in the library's home.
        quiet: show no progress.
        dry_run: check everything, show what the run would take, and change nothing.
        Others: see `ExpertRequest`, `Source` and `Recipe`, which says what is taken where None is given; without
            `minutes` and `tokens`, five minutes.

    Raises:
        DataError, TrainError, ConfigError, HubError: with the cause and the mend.
        KeyboardInterrupt: after Ctrl-C; its message says how to go on.
    """
    paths = from_git, from_folder, from_jsonl, from_parquet
    share = QUESTIONS if questions is None else questions
    source = Source.at(*paths, held_out=held_out, by=split, seed=seed, questions=share)
    recipe = _recipe(base, layers)
    request = ExpertRequest(
        base=base, name=name, source=source, layers=layers,
        width=width or recipe.width, minutes=DEFAULT_MINUTES if minutes is None and tokens is None else minutes,
        tokens=tokens, epochs=epochs or recipe.epochs, row_length=row_length,
        batch_rows=batch_rows or recipe.batch_rows, learning_rate=learning_rate or recipe.learning_rate,
        held_out_tokens=held_out_tokens, licence=licence, domain=domain, seed=seed,
    )  # fmt: skip
    pack, folder = Path(out or experts_folder() / f"{name}{SUFFIX}"), Path(run_folder or home() / "runs" / name)
    return run_once(ExpertRun, request, request.as_json(), pack, folder, quiet, dry_run)


def _recipe(base: str, layers: str) -> Recipe:
    """Return the recipe for these layers of a base model."""
    num_layers = read_config(resolve(base))["num_hidden_layers"]
    return CACHED if parse_layers(layers, num_layers)[0] > 0 else WHOLE
