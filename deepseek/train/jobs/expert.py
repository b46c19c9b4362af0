"""`deepseek.train_expert`: train an expert pack on text; the base stays frozen.

documents -> clean -> split -> token shards -> plan -> trunk cache -> train -> calibrate the gates
-> pack

The run folder stores the result of each finished stage, so that a run can be resumed.
"""

import time
from dataclasses import asdict
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from deepseek.checkpoint.store import read_object, write_json
from deepseek.data import Batch, RowLoader
from deepseek.data.text.encode import CONTEXT_BIT
from deepseek.device.memory import peak_memory
from deepseek.errors import CheckpointError, DataError, PackError
from deepseek.model.language_model import expert_beside, expert_layers
from deepseek.packs.library import SUFFIX, experts_folder
from deepseek.packs.manifest import HELD_OUT, Metric, explain
from deepseek.packs.pack import ExpertPack, write_pack
from deepseek.text.tokenizer import encode_plain
from deepseek.train.gates.background import background
from deepseek.train.gates.calibrate import FEWEST_TOKENS, GateCalibration, calibrate
from deepseek.train.gates.public_text import public_statistics
from deepseek.train.gates.replay import Replay
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.declaration import job
from deepseek.train.jobs.expert_request import ExpertRequest, expert_request, recipe_from
from deepseek.train.jobs.expert_task import ExpertTask, output_paces
from deepseek.train.jobs.outcome import Outcome
from deepseek.train.jobs.plan import Amount, Speed, TrainingPlan, check_tokens, make_plan, timed
from deepseek.train.jobs.text_run import TextRun, Texts, text_inputs
from deepseek.train.loop.layers import parse_layers
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.loop.runs import Run, run_once
from deepseek.train.text.corpus import Corpus, whole_text
from deepseek.train.text.question_mix import asked_about
from deepseek.train.text.trunk_cache import Stream, run_trunk

CALIBRATION_TOKENS = 40_000
"""Tokens of the expert's own training text for calibrating its gates."""

UNSEEN_TOKENS = 16_384
"""Maximum validation tokens for scaling and checking the gates."""

RELEVANCE_TOKENS = 1_000_000
"""Tokens of the expert's own text for its relevance table; larger, as this needs no forward pass.
"""


class ExpertRun(TextRun):
    """One training of an expert in its run folder, with the base loaded and frozen."""

    def __init__(
        self, request: ExpertRequest, folder: Path, out: Path, progress: ProgressBar
    ) -> None:
        super().__init__(request, folder, progress, frozen=True)
        self.request = request
        self.out = out
        self.model.requires_grad_(False)
        layers = parse_layers(request.layers, expert_layers(self.model))
        self.first = layers[0]
        self.cached_below = self.first > 0
        self.module = expert_beside(
            self.model, request.name, layers, request.width, seed=request.seed
        )
        self.check_papers()

    def run(self) -> dict[str, Any]:
        """Run all stages, write the pack, and return the figures of the run."""
        corpus = self.corpus()
        texts = self.texts(corpus)
        write_json(self.folder / "request.json", self.request.as_json())
        plan = self.plan(texts)
        outcome = self.train(texts, plan)
        # The time budget doesn't cover gate calibration, so the reported seconds don't either.
        seconds = self.clock.seconds
        self.progress.say("calibrating the gates")
        gates = self.calibrate(texts, plan)
        write_pack(self.out, self.pack(outcome.reported, (corpus.train.digest,), corpus.commit))
        self.drop_trunk()
        self.progress.say(
            f"{self.request.name} is {outcome}; recall {gates.recall:.1%}, "
            f"false positives {gates.false_positives:.1%}, "
            f"peak memory {peak_memory(self.device) / 1e9:.1f} GB, {self.out}"
        )
        return {
            "pack": str(self.out),
            "verdict": outcome.reported.verdict,
            "story": outcome.story,
            "seconds": seconds,
            **asdict(outcome.result.position),
            "plan": asdict(plan),
            "gates": asdict(gates),
            "device": str(self.device),
            "peak_memory": peak_memory(self.device),
            **outcome.reported.model_dump(),
        }

    def estimate(self) -> str:
        """Return the estimated tokens, time, memory and disk space, from a timed batch."""
        texts = self.texts(self.corpus())
        plan = self.plan_for(texts, self.measure(texts, with_public_text=False))
        request = self.request
        row_bytes = request.row_length * self.model.config.hidden_size
        scored = (plan.held_out_rows + plan.validation_rows) * self.model.dtype.itemsize
        cache = (plan.rows * 2 + scored) * row_bytes if self.cached_below else 0
        pack = sum(parameter.numel() * 2 for parameter in self.module.parameters())
        return (
            f"{plan.rows * request.row_length:,} tokens in {plan.steps} steps, "
            f"about {plan.seconds / 60:.1f} minutes on {self.device}; "
            f"memory {peak_memory(self.device) / 1e9:.1f} GB, "
            f"trunk cache {cache / 1e6:,.0f} MB, pack {pack / 1e6:,.0f} MB"
        )

    def check_papers(self) -> None:
        """Raise `PackError` before hours of training if the pack's manifest would be invalid."""
        try:
            self.pack(Metric(before=0.0, after=0.0), data=(), commit=None)
        except ValidationError as error:
            raise PackError(
                f"The expert's manifest would be invalid: {explain(error)}; correct the argument."
            ) from None

    def pack(self, held_out: Metric, data: tuple[str, ...], commit: str | None) -> ExpertPack:
        """Return the module as a pack.

        Args:
            held_out: loss on the held-out set before and after training, in nats per token.
            data: digests of the training text.
            commit: git commit of the text, if it has one.
        """
        base = self.model.experts.base
        request = self.request
        metrics = {HELD_OUT: held_out}
        return self.module.to_pack(
            base, request.licence, domain=request.domain, data=data, commit=commit, metrics=metrics
        )

    def texts(self, corpus: Corpus) -> Texts:
        """Return the packed rows of a corpus.

        Raises:
            DataError: the corpus is too small to train or calibrate an expert.
        """
        validation = corpus.validation.num_tokens if corpus.validation else 0
        held_out = corpus.held_out.num_tokens + validation
        if min(corpus.train.num_tokens, held_out) < FEWEST_TOKENS:
            raise DataError(
                f"There are {corpus.train.num_tokens} tokens to train on and {held_out} held out; "
                f"at least {FEWEST_TOKENS} of each are needed, so give more text."
            )
        texts = super().texts(corpus)
        # Fail early if there is too little text; the speed is measured later.
        self.checked_plan(texts, None, Speed(trunk=0, step=0, evaluate=0))
        return texts

    def plan(self, texts: Texts) -> TrainingPlan:
        """Return the plan of this run; the first call measures the speed and stores the plan."""
        path = self.folder / "plan.json"
        if not path.is_file():
            speed = self.measure(texts)
            write_json(path, {"plan": asdict(self.plan_for(texts, speed)), "speed": asdict(speed)})
        try:
            return TrainingPlan(**read_object(path)["plan"])
        except (KeyError, TypeError):
            raise CheckpointError(f"{path} holds no plan; delete it to plan again.") from None

    def plan_for(self, texts: Texts, speed: Speed) -> TrainingPlan:
        """Return a plan that fits the remaining minutes, or one for the tokens of the request."""
        minutes = self.request.minutes
        seconds_left = None if minutes is None else max(0.0, minutes * 60 - self.clock.here)
        return self.checked_plan(texts, seconds_left, speed)

    def checked_plan(self, texts: Texts, seconds: float | None, speed: Speed) -> TrainingPlan:
        """Return a plan with enough tokens for the gates.

        Args:
            texts: packed rows.
            seconds: time budget; None: unlimited.
            speed: measured seconds per row.

        Raises:
            TrainError: the plan has too few tokens, or not one step fits.
        """
        request = self.request
        amount = Amount(
            request.tokens,
            request.epochs,
            recipe_from(self.first).shortest,
            request.row_length,
            request.batch_rows,
            request.held_out_tokens,
        )
        plan = make_plan(amount, seconds, speed, texts.counts)
        check_tokens(plan, request.row_length, FEWEST_TOKENS)
        return plan

    def measure(self, texts: Texts, *, with_public_text: bool = True) -> Speed:
        """Time one batch through trunk, training step and evaluation, and discard its gradients.

        Args:
            texts: packed rows.
            with_public_text: whether to replay public text, which takes long to make for a new
                base; otherwise the expert's own text stands in for it.
        """
        text = texts.train.first(self.request.batch_rows)
        warm_up = text.rows(text.row_ids[:1])
        batch = text.rows(text.row_ids)
        stream: Stream = partial(run_trunk, self.model, self.first)
        seconds = 0.0
        if self.cached_below:
            seconds, cached_BTD = timed(stream, warm_up, batch, self.device)
            stream = lambda rows: cached_BTD[: len(rows.row_ids)]  # noqa: E731
        replay = None if with_public_text else Replay.of(batch, stream(batch), self.step_tokens)
        task = self.task(text, [], (stream, stream), replay)
        learn = lambda rows: task.loss(rows, 0).loss.backward()  # noqa: E731
        step, _ = timed(learn, warm_up, batch, self.device)
        self.module.zero_grad()
        score = lambda rows: task.score(rows, stream(rows))  # noqa: E731
        evaluate, _ = timed(score, warm_up, batch, self.device)
        return Speed(seconds, step, evaluate)

    def stored_paces(self, batch: Batch, stream_BTD: Tensor) -> dict[str, float]:
        """Return the paces of the down projections (see `output_paces`). They are measured once,
        since another device gives other last bits, and a resumed run must use the same values.
        """
        path = self.folder / "paces.json"
        if not path.is_file():
            write_json(path, output_paces(self.model, self.module.layers, batch, stream_BTD))
        return {name: float(pace) for name, pace in read_object(path).items()}

    def corpora(self) -> list[Path]:
        """Return the corpus folders of all text that the expert was trained on."""
        return [self.folder / "corpus"]

    def train(self, texts: Texts, plan: TrainingPlan) -> Outcome:
        """Fill the trunk caches and run the training loop."""
        texts = texts.planned(plan)
        train, held_out = self.streams(texts)
        validation = self.exact_stream("validation", texts.validation)
        task = self.task(texts.train, texts.validation.batches(), (train, validation))
        first = texts.train.rows(texts.train.row_ids[: self.request.batch_rows])
        self.paces = self.stored_paces(first, train(first))
        return self.loop(
            task, texts.train, plan, partial(task.loss_on, texts.held_out.batches(), held_out)
        )

    def calibrate(self, texts: Texts, plan: TrainingPlan) -> GateCalibration:
        """Calibrate the gates of the trained module on some of its own text and on public text."""
        public = public_statistics(
            self.model, self.tokenizer, self.module.layers, progress=self.progress
        )
        words = background(self.model, self.tokenizer, self.progress)
        corpora = self.corpora()
        ids_N = np.concatenate([whole_text(corpus).ids_N for corpus in corpora])
        own_ids_N = torch.from_numpy(ids_N[:RELEVANCE_TOKENS] & ~CONTEXT_BIT).long()
        asked = (asked_about(corpus / "questions.jsonl") for corpus in corpora)
        questions = encode_plain(self.tokenizer, [*chain.from_iterable(asked)])
        question_ids_N = torch.tensor(
            [token for ids in questions for token in ids], dtype=torch.long
        )
        unseen = texts.validation.first(max(1, UNSEEN_TOKENS // texts.validation.length)).batches()
        # Too little validation text to check the gates alone: add the reported held-out rows, which
        # an update checks on anyway.
        too_few = texts.validation.shards.num_tokens < 2 * FEWEST_TOKENS
        if too_few and texts.validation.shards is not texts.held_out.shards:
            unseen += texts.held_out.batches()
        texts = texts.planned(plan)
        train, _ = self.streams(texts)
        compute = partial(run_trunk, self.model, self.first)
        rows = min(plan.rows, max(1, CALIBRATION_TOKENS // texts.train.length))
        return calibrate(
            self.model,
            self.module,
            texts.train.first(rows).batches(),
            unseen,
            public,
            streams=(train, compute),
            words=words,
            own_kinds=[own_ids_N, question_ids_N],
            progress=self.progress,
        )

    def streams(self, texts: Texts) -> tuple[Stream, Stream]:
        """Return functions that give the trunk's hidden states of training rows and of held-out
        rows.
        """
        if not self.cached_below:
            compute = partial(run_trunk, self.model, self.first)  # nothing is below layer 0
            return compute, compute
        return self.cached_stream("train", texts.train, torch.bfloat16), self.exact_stream(
            "held-out", texts.held_out
        )

    def exact_stream(self, name: str, text: RowLoader) -> Stream:
        """Return a function that gives the trunk's hidden states in the model's dtype, for exact
        scores.
        """
        if not self.cached_below:
            return partial(run_trunk, self.model, self.first)
        return self.cached_stream(name, text, self.model.dtype)

    def cached_stream(self, name: str, text: RowLoader, dtype: torch.dtype) -> Stream:
        """Return a function that reads the trunk's hidden states from a cache."""
        compute = partial(run_trunk, self.model, self.first)
        return self.cached(name, text, self.first, compute, str(self.model.dtype), dtype)

    def task(
        self,
        text: RowLoader,
        held_out: list[Batch],
        streams: tuple[Stream, Stream],
        replay: Replay | None = None,
    ) -> ExpertTask:
        """Return the training task, by default with the base's public text as replay. The output
        head of its loss covers only likely tokens (see `head`).
        """
        replay = replay or self.replay
        return ExpertTask(
            self.model,
            self.module,
            self.head(text, replay.rows.labels.flatten()),
            stream=streams[0],
            held_out=held_out,
            held_out_stream=streams[1],
            replay=replay,
        )

    @property
    def step_tokens(self) -> int:
        """Tokens of the expert's own text in a step."""
        return self.request.batch_rows * self.request.row_length

    @cached_property
    def replay(self) -> Replay:
        """Public text to train on along with the expert's own.

        Building it is done once per base, and does not count against the minutes.
        """
        before = time.monotonic()
        replay = Replay.beside(
            self.model, self.tokenizer, self.first, self.step_tokens, self.progress
        )
        self.clock.leave_out(time.monotonic() - before)
        return replay


@job(ExpertArguments)
def train_expert(arguments: ExpertArguments) -> Path:
    """Train an expert module on text and return the path of its pack. The same call resumes a run.

    With `update`, a trained expert is continued with what is new in its source instead.

    Raises:
        DataError, TrainError, ConfigError, HubError: the message states the cause and the fix.
        KeyboardInterrupt: after Ctrl-C; the message says how to resume.
    """
    if arguments.update:
        from deepseek.train.jobs.update import update_expert  # it imports this module

        return update_expert(arguments)
    request = expert_request(arguments)
    pack = experts_folder() / f"{request.name}{SUFFIX}"
    run = Run.of(request, pack, partial(text_inputs, request))
    return run_once(ExpertRun, request, run)
