"""What all trainings on a user's text share: corpus, trunk cache and loop.

Held-out text has two parts. The loop chooses the best state by the validation part. The other part
influences nothing; it is scored exactly before the first and after the last step, and the report
shows these figures.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import read_object, write_json
from deepseek.data import Batch, RowLoader
from deepseek.device.choose import choose_device, choose_dtype
from deepseek.device.memory import total_memory
from deepseek.engine.memory import memory_need
from deepseek.errors import CheckpointError, ConfigError, DataError
from deepseek.kernels.cross_entropy import CandidateHead
from deepseek.model.language_model import (
    LanguageModel,
    context_length,
    is_own,
    load_language_model,
    output_head,
)
from deepseek.model.precision import compute_dtype
from deepseek.model.pretrained import load_stored
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.manifest import Metric
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.jobs.outcome import Outcome, tell
from deepseek.train.jobs.plan import RowCounts, TrainingPlan
from deepseek.train.jobs.text_request import ROW_LENGTH, TextRequest
from deepseek.train.loop.loop import Hooks, LoopConfig, Task, train
from deepseek.train.loop.optim import OptimConfig
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.loop.stopwatch import Stopwatch
from deepseek.train.text.corpus import Corpus, build_corpus
from deepseek.train.text.inputs import base_digest, text_digest
from deepseek.train.text.trunk_cache import Stream, TrunkCache

FREQUENT_TOKENS = 4096
"""Number of first ids that always join the candidates of the training loss. The first ids of a
byte-pair vocabulary are its most frequent tokens.
"""

LOADED_SHARE = 1 / 4
"""Largest share of the machine's memory for the weights of a frozen base; the weights of a larger
one stay in its files.
"""

SAMPLED_TOKENS = 1024
"""Further ids drawn at every step to estimate the rest of the partition function."""

FEWEST_HELD_OUT = 32
"""Minimum tokens of validation text, and of reported held-out text, for a meaningful loss."""

PATIENCE = 4
"""Consecutive evaluations without a lower loss, about one pass, after which a run returns to its
best state.
"""


@dataclass(frozen=True)
class Texts:
    """Packed rows for training, for the report, and for choosing the best state."""

    train: RowLoader
    held_out: RowLoader
    validation: RowLoader

    @property
    def counts(self) -> RowCounts:
        """Numbers of rows."""
        parts = (self.train, self.validation, self.held_out)
        return RowCounts(*(len(part.row_ids) for part in parts))

    def first(self, rows: int, held_out_rows: int, validation_rows: int) -> "Texts":
        """Return a subset of the rows, the same one at every call."""
        validation = self.validation.first(validation_rows)
        return Texts(self.train.first(rows), self.held_out.first(held_out_rows), validation)

    def planned(self, plan: TrainingPlan) -> "Texts":
        """Return the rows that a plan uses."""
        return self.first(plan.rows, plan.held_out_rows, plan.validation_rows)


def text_inputs(request: TextRequest, without: Sequence[Path]) -> dict[str, str]:
    """Return the digests of a training's text and base model.

    Args:
        request: resolved arguments.
        without: files and folders that the run itself writes.
    """
    source = request.source
    return {"text": text_digest(source, without), "base": base_digest(request.base)}


def stored_loss(path: Path) -> float:
    """Return the loss of the base, as a run has stored it.

    Raises:
        CheckpointError: the file is damaged.
    """
    loss = read_object(path).get("loss")
    if not isinstance(loss, float):
        raise CheckpointError(f"{path} holds no loss; delete it to score the base again.")
    return loss


def load_base(
    folder: Path, dtype: torch.dtype, device: torch.device, *, frozen: bool
) -> LanguageModel:
    """Load the base of a training.

    Args:
        folder: the base's folder.
        dtype: dtype of the weights.
        device: where to compute.
        frozen: whether the weights are only read. On the CPU, those of a base that is large for the
            machine then stay in the checkpoint's files (`model/stored.py`).
    """
    if frozen and device.type == "cpu" and is_own(read_object(folder / "config.json")):
        need = memory_need(folder, dtype, cache_bytes=0, packed=False)
        if need.weights > LOADED_SHARE * total_memory():
            return load_stored(DeepSeekModel, folder, dtype, device)
    return load_language_model(folder, dtype=dtype, device=device)


def evaluation_interval(plan: TrainingPlan, folder: Path) -> int:
    """Return the steps from one evaluation to the next; a run that has begun keeps its interval.

    Args:
        plan: steps and evaluations.
        folder: folder of the training loop.
    """
    begun = folder / "config.json"
    stored = read_object(begun) if begun.is_file() else {}
    if stored.get("steps") == plan.steps and isinstance(stored.get("evaluate_every"), int):
        return int(stored["evaluate_every"])
    return plan.evaluate_every


class TextRun:
    """One training in its run folder, with its model.

    Attributes:
        may_choose_rows: whether the user can give `row_length`.
        clock: measures the duration of the run.
        paces: learning rates of single parameters as shares of the others', see `OptimConfig`.
    """

    may_choose_rows = True

    def __init__(
        self,
        request: TextRequest,
        folder: Path,
        progress: ProgressBar,
        weights: torch.dtype | None = None,
        *,
        frozen: bool = False,
    ) -> None:
        """Load the base model.

        Args:
            request: what to train.
            folder: the run folder.
            progress: shows what is running.
            weights: dtype of the base's weights; None: the compute dtype.
            frozen: whether the weights are only read (see `load_base`).

        Raises:
            ConfigError: the rows are longer than the base's context.
        """
        self.folder = folder
        self.progress = progress
        self.clock = Stopwatch(folder)
        self.device = choose_device(request.device)
        dtype = choose_dtype(request.dtype, self.device)
        self.base = resolve(request.base)
        self.model = load_base(self.base, weights or dtype, self.device, frozen=frozen)
        self.model.compute_dtype = dtype
        context = context_length(self.model)
        # Runs begun by an earlier version, and updates of their experts, may have longer rows.
        is_new = not (folder / "request.json").is_file() and self.may_choose_rows
        if request.row_length > context and is_new:
            raise ConfigError(
                f"row_length={request.row_length} is impossible; {request.base} has a context of "
                f"{context} tokens: give at most that."
            )
        if request.row_length == context < ROW_LENGTH and is_new:
            progress.say(f"rows have {context} tokens, the whole context of {request.base}")
        self.tokenizer = load_tokenizer(self.base)
        self.paces: dict[str, float] = {}
        self._request = request

    def corpus(self) -> Corpus:
        """Return the corpus as token shards; only the first call reads the source."""
        folder = self.folder / "corpus"
        corpus = build_corpus(
            self._request.source, self.tokenizer, folder, self.progress, validation=True
        )
        self.progress.say(corpus.report)
        return corpus

    def texts(self, corpus: Corpus) -> Texts:
        """Return the packed rows of a corpus.

        Raises:
            DataError: there is too little held-out text.
        """
        request = self._request
        if (
            corpus.validation is None
            or min(corpus.validation.num_tokens, corpus.held_out.num_tokens) < FEWEST_HELD_OUT
        ):
            raise DataError(
                f"The held-out set is too small: at least {FEWEST_HELD_OUT} tokens are needed to "
                "choose the best state, and as many to report on; give more text."
            )
        parts = (
            RowLoader(shards, request.batch_rows, request.row_length, request.seed).with_targets()
            for shards in (corpus.train, corpus.held_out, corpus.validation)
        )
        return Texts(*parts)

    def head(self, text: RowLoader, *further: Tensor) -> CandidateHead:
        """Return an output head restricted to likely tokens.

        Args:
            text: rows whose labels are candidates.
            further: more labels that are candidates.
        """
        labels = torch.cat(
            [
                *(text.rows([row]).labels.flatten().unique() for row in text.row_ids.tolist()),
                *further,
            ]
        )
        frequent = torch.arange(min(FREQUENT_TOKENS, self.model.config.vocab_size))
        candidates = torch.cat([labels[labels >= 0], frequent]).unique()
        head = output_head(self.model)
        return CandidateHead(
            head.weight_VD,
            candidates,
            SAMPLED_TOKENS,
            self._request.seed,
            head.cap,
            compute_dtype(self.model),
        )

    def cached(
        self,
        name: str,
        text: RowLoader,
        layer: int,
        compute: Callable[[Batch], Tensor],
        computed: str,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Stream:
        """Return a function that reads the hidden states entering the trained part from a cache.

        Args:
            name: name of the cache.
            text: rows to cache.
            layer: first block of the trained part.
            compute: computes the hidden states `[B, T, D]` of a batch, to fill the cache.
            computed: cache key describing how the hidden states are computed.
            dtype: dtype of the cache.
        """
        base = self.model.experts.base.weights
        width = self.model.config.hidden_size
        label = f"trunk ({name})"
        key = {"base": base, "shards": text.shards.digest, "layer": layer, "computed": computed}
        cache = TrunkCache(
            self.folder / "trunk" / name, key, text.row_ids, text.length, width, dtype
        )
        cache.fill(
            text,
            compute,
            self._request.batch_rows,
            lambda done, total: self.progress(done, total, label),
        )
        cache.place(self.device)
        return lambda batch: cache.read(batch.row_ids)

    def loop(
        self, task: Task[Batch], text: RowLoader, plan: TrainingPlan, test: Callable[[], float]
    ) -> Outcome:
        """Train and return to the state with the lowest loss on validation rows.

        Args:
            task: what to train.
            text: training rows.
            plan: steps and evaluations.
            test: returns the exact loss on the reported held-out rows; called before and after.
        """
        path = self.folder / "base.json"
        if not path.is_file():
            self.progress.say("scoring the base")
            write_json(path, {"loss": test()})
        steps = plan.steps
        config = LoopConfig(
            OptimConfig(learning_rate=self._request.peak_rate(plan), paces=self.paces),
            steps=steps,
            seed=self._request.seed,
            evaluate_every=evaluation_interval(plan, self.folder / "training"),
            checkpoint_every=max(10, steps // 10),
            keep_best="held_out_loss",
            patience=PATIENCE,
        )
        self.clock.keep()
        hooks = getattr(task, "hooks", None) or Hooks()
        hooks = replace(hooks, evaluated=lambda _step: self.clock.keep())
        try:
            result = train(
                task, text, config, self.folder / "training", progress=self.progress, hooks=hooks
            )
        finally:
            self.clock.keep()
        reported = Metric(before=stored_loss(path), after=test())
        steps_a_pass = len(text.row_ids) / text.batch_rows
        return Outcome(result, reported, tell(result.position, steps, steps_a_pass, plan.limit))

    def drop_trunk(self) -> None:
        """Delete the trunk caches, by far the largest part of a run folder."""
        shutil.rmtree(self.folder / "trunk", ignore_errors=True)
