"""The training loop, the only one: a task says what is trained and how it is scored, the loop does everything else.

A run lives in a folder: `config.json` (resolved), `metrics.jsonl`, `loss.png`, `tensorboard/` and `checkpoints/`.
Calling `train` again with the same arguments continues after the newest checkpoint and ends with the same bits as a run
that was never interrupted: weights, moments, random state and the place in the data are all restored.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from deepseek.checkpoint import store
from deepseek.errors import TrainError
from deepseek.train.backends import SINGLE, Backend
from deepseek.train.losses import autocast
from deepseek.train.metrics import MetricsLog, plot_losses
from deepseek.train.optim import OptimConfig, TrainingState, adamw, clip_gradients, learning_rate
from deepseek.train.progress import InterruptGuard, ProgressBar
from deepseek.train.runs import check_config

MAX_SKIPPED_IN_A_ROW = 10
"""Non-finite steps in a row after which the run has diverged and going on is of no use."""

SPIKE_WINDOW = 64
"""Losses of past steps that a new one is compared with."""

SPIKE_SIGMAS = 6.0
"""Standard deviations above their mean at which a loss is a spike: its step is skipped."""

MAX_SPIKES_IN_A_ROW = 3
"""A loss that stays up is no spike but a new level, harder text for one, and is then learned from."""

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)
B_contra = TypeVar("B_contra", contravariant=True)


@dataclass(frozen=True)
class LossOutput:
    """What a task returns for one batch.

    Attributes:
        loss: scalar to minimise.
        tokens: how many targets it is the mean over.
        metrics: further figures to record.
    """

    loss: Tensor
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Batches(Protocol[B_co]):
    """An endless stream of batches whose place is a few integers (`data.RowLoader` is one)."""

    def next(self) -> B_co: ...
    def state(self) -> dict[str, int]: ...
    def load(self, state: dict[str, int]) -> None: ...


class Task(Protocol[B_contra]):
    """What is trained.

    `loss` may depend on the step (counted in batches), never on hidden state of its own; `evaluate` returns named
    figures, `held_out_loss` among them if there is held-out text, and is called between steps.
    """

    @property
    def parameters(self) -> dict[str, nn.Parameter]: ...
    def loss(self, batch: B_contra, step: int) -> LossOutput: ...
    def evaluate(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Hooks:
    """What a task may add to the loop.

    Attributes:
        buffers: tensors beside the parameters that training changes, saved and restored with them.
        stepped: called after every optimizer step with its rate's share of the peak; returns figures to record.
        evaluated: called with the number of steps done after every evaluation.
    """

    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    stepped: Callable[[float], Mapping[str, float]] = lambda _: {}
    evaluated: Callable[[int], object] = int


@dataclass(frozen=True)
class LoopConfig:
    """How long and how often.

    Attributes:
        optim: optimizer and schedule.
        steps: optimizer steps in all.
        accumulate: batches a step.
        evaluate_every: steps between evaluations; the first comes before step 0 and the last after the end.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints kept.
        seed: of PyTorch's random numbers.
    """

    optim: OptimConfig
    steps: int
    accumulate: int = 1
    evaluate_every: int = 100
    checkpoint_every: int = 100
    keep: int = 2
    seed: int = 0


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: steps done.
        skipped: those among them that moved nothing, for non-finite values or a spike of the loss.
        skipped_in_a_row: latest steps skipped for non-finite values.
        spikes_in_a_row: latest steps skipped for a spike.
        tokens: targets seen.
        recent: latest losses, which tell a spike from the usual noise.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes_in_a_row: int = 0
    tokens: int = 0
    recent: list[float] = field(default_factory=list)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` lies far above the recent ones; a level that stays is accepted and the window begun anew."""
        spike = False
        if len(self.recent) == SPIKE_WINDOW:
            mean = fmean(self.recent)
            # Nearly constant losses have no noise to measure by: a hundredth of their size is the least that counts.
            spike = loss > mean + SPIKE_SIGMAS * max(pstdev(self.recent), 0.01 * abs(mean))
        if spike and self.spikes_in_a_row == MAX_SPIKES_IN_A_ROW:
            self.recent.clear()
            spike = False
        self.spikes_in_a_row = self.spikes_in_a_row + 1 if spike else 0
        if not spike:
            self.recent = [*self.recent, loss][-SPIKE_WINDOW:]
        return spike


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended, and its last evaluation."""

    position: Position
    metrics: dict[str, float]


def train(
    task: Task[B],
    batches: Batches[B],
    config: LoopConfig,
    folder: Path,
    *,
    progress: ProgressBar,
    hooks: Hooks | None = None,
    backend: Backend = SINGLE,
) -> TrainResult:
    """Train `task` to the end of `config.steps`, from the newest checkpoint in `folder` if there is one.

    Args:
        folder: of the run.
        hooks: what the task adds to the loop.
        backend: one process or many, each of which takes its part of every batch and of every parameter.

    Raises:
        TrainError: the run in `folder` had another configuration, it diverged, or the disk is full.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with the step finished and a checkpoint written.
    """
    check_config(folder / "config.json", asdict(config))
    backend.barrier()
    if backend.main:
        store.write_json(folder / "config.json", asdict(config))
    return _Run(task, batches, config, folder, progress, hooks or Hooks(), backend).run()


@dataclass
class _Run:
    """One call of `train`."""

    task: Task[Any]
    batches: Batches[Any]
    config: LoopConfig
    folder: Path
    progress: ProgressBar
    hooks: Hooks
    backend: Backend

    def __post_init__(self) -> None:
        self.checkpoints = self.folder / "checkpoints"
        self.parameters = self.task.parameters
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = adamw(self.parameters, self.config.optim)
        self.state = TrainingState(self.parameters, self.hooks.buffers, self.optimizer)
        self.position = Position()
        self.saved_step = -1

    def run(self) -> TrainResult:
        self.restore()
        self.log = MetricsLog(self.folder, self.position.step) if self.backend.main else None
        figures: dict[str, float] = {}
        try:
            with InterruptGuard() as interrupt:
                while self.position.step < self.config.steps:
                    if self.position.step % self.config.evaluate_every == 0:
                        figures = self.evaluate()
                    self.step()
                    if self.backend.any(interrupt.asked):
                        self.save()
                        raise KeyboardInterrupt(
                            f"stopped after step {self.position.step} of {self.config.steps}, nothing is lost; the "
                            "same call goes on"
                        )
                    if self.position.step % self.config.checkpoint_every == 0:
                        self.save()
                figures = self.evaluate()
                self.save()
        finally:
            if self.log is not None:
                with suppress(OSError):  # a full disk has been reported; the plot must not hide it
                    self.log.close()
                    plot_losses(self.folder)
        return TrainResult(self.position, figures)

    def step(self) -> None:
        """Make one optimizer step, or skip it if loss or gradient is not finite or the loss is a spike."""
        started, position, optim = time.perf_counter(), self.position, self.config.optim
        rate = learning_rate(optim, position.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["pace"]
        loss, tokens, extra = self.backward()
        norm = clip_gradients(self.parameters.values(), optim.clip_norm)
        finite = math.isfinite(loss) and norm < float("inf")  # False for NaN too
        taken = finite and not position.is_spike(loss)
        if taken:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.count(finite, taken, tokens)
        if taken:
            extra = {**extra, **self.hooks.stepped(rate / optim.learning_rate)}
            speed = tokens / (time.perf_counter() - started)
            self.write(
                position.step - 1, loss=loss, learning_rate=rate, grad_norm=norm, tokens=position.tokens,
                tokens_per_second=speed, **extra,
            )  # fmt: skip
            note = f"loss {loss:.3f}  {speed:,.0f} tokens/s"
            self.progress(position.step, self.config.steps, "train", note)

    def backward(self) -> tuple[float, int, Mapping[str, float]]:
        """Accumulate the gradients of one step's batches; return its mean loss, its targets and further figures."""
        losses, tokens, parts = [], 0, self.config.accumulate
        for part in range(parts):
            with autocast(self.device):
                batch = self.backend.share(self.batches.next())
                output = self.task.loss(batch, self.position.step * parts + part)
            weight, seen = self.backend.weigh(output.tokens)
            (output.loss * weight / parts).backward()
            losses.append(output.loss.detach() * weight)
            tokens += seen
        return float(self.backend.mean(torch.stack(losses)).mean()), tokens, output.metrics

    def count(self, finite: bool, taken: bool, tokens: int) -> None:
        """Move on; give up where nothing but non-finite values comes."""
        position = self.position
        position.step += 1
        position.tokens += tokens
        position.skipped += not taken
        position.skipped_in_a_row = 0 if finite else position.skipped_in_a_row + 1
        if not taken:
            self.write(position.step - 1, skipped=position.skipped)
        if position.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainError(
                f"The last {MAX_SKIPPED_IN_A_ROW} steps had a loss or gradient that is not finite; start a new run "
                f"with a lower learning rate than {self.config.optim.learning_rate}."
            )

    def evaluate(self) -> dict[str, float]:
        """Evaluate and record the figures."""
        figures = self.task.evaluate()
        if figures:
            self.write(self.position.step, **figures)
            if self.backend.main:
                plot_losses(self.folder)
        self.hooks.evaluated(self.position.step)
        return figures

    def write(self, step: int, **figures: float) -> None:
        """Record figures, in the main process alone."""
        if self.log is not None:
            self.log.write(step, **figures)

    def save(self) -> None:
        """Write a checkpoint unless this step has one, then drop old ones."""
        position = self.position
        if self.saved_step == position.step:
            return
        meta = {"position": asdict(position), "batches": self.batches.state()}
        folder = self.checkpoints / f"step-{position.step:08d}"
        self.backend.save(folder, self.state, meta)
        self.saved_step = position.step
        if self.backend.main:
            store.prune(self.checkpoints, self.config.keep)

    def restore(self) -> None:
        """Continue from the newest checkpoint, or seed a fresh run."""
        torch.manual_seed(self.config.seed)
        newest = store.latest_state(self.checkpoints)
        if newest is None:
            return
        meta = self.backend.load(newest, self.state)
        self.batches.load(meta["batches"])
        self.position = Position(**meta["position"])
        self.saved_step = self.position.step
        self.progress.say(f"going on after step {self.position.step} of {self.config.steps}")
