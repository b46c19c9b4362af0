"""The training loop, the only one: a task says what is trained and how it is scored, the loop does
everything else.

A run lives in a folder: `config.json` (resolved), `metrics.jsonl`, `loss.png`, `tensorboard/` and
`checkpoints/`. Calling `train` again with the same arguments continues after the newest checkpoint
and ends with the same bits as a run that was never interrupted: weights, moments, random state and
the place in the data are all restored.

A run may keep its best state (`LoopConfig.keep_best`): the weights at its lowest held-out figure
lie in `best/` and are those of the task when `train` returns, whatever came after. Where the figure
no longer falls, the run goes back to them once, lets the rate fall to its end over a few more
steps, and stops.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from deepseek.checkpoint import store
from deepseek.train.loop.backends import SINGLE, Backend
from deepseek.train.loop.losses import autocast
from deepseek.train.loop.metrics import MetricsLog, plot_losses
from deepseek.train.loop.optim import (
    OptimConfig,
    TrainingState,
    Weights,
    adamw,
    clip_gradients,
    cooling_rate,
    learning_rate,
)
from deepseek.train.loop.position import Position
from deepseek.train.loop.progress import InterruptGuard, ProgressBar
from deepseek.train.loop.runs import check_config

PLOT_SECONDS = 20.0
"""Time between two plots; drawing one takes as long as some steps."""

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

    `loss` may depend on the step (counted in batches), never on hidden state of its own; `evaluate`
    returns named figures, `held_out_loss` among them if there is held-out text, and is called
    between steps.
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
        stepped: called after every optimizer step with its rate's share of the peak; returns
            figures to record.
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
        evaluate_every: steps between evaluations; the first comes before step 0 and the last after
            the end.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints kept.
        seed: of PyTorch's random numbers.
        keep_best: figure of the evaluations at whose lowest value the weights are kept and given
            back at the end; "" ends with the last ones.
        patience: evaluations in a row without a lower figure after which the run cools down, then
            ends; 0: never.
        cooldown: steps of that cool-down, as a share of those that led to the best state.
    """

    optim: OptimConfig
    steps: int
    accumulate: int = 1
    evaluate_every: int = 100
    checkpoint_every: int = 100
    keep: int = 2
    seed: int = 0
    keep_best: str = ""
    patience: int = 0
    cooldown: float = 0.25


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended, and its last evaluation; where the best state is kept, the figure of that
    one.
    """

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
    """Train `task` to the end of `config.steps`, or until it is at its best, from the newest
    checkpoint in `folder`.

    Args:
        folder: of the run.
        hooks: what the task adds to the loop.
        backend: one process or many, each of which takes its part of every batch and of every
            parameter.

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
        self.best = self.folder / "best"
        self.parameters = self.task.parameters
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = adamw(self.parameters, self.config.optim)
        self.state = TrainingState(self.parameters, self.hooks.buffers, self.optimizer)
        self.weights = Weights(self.parameters, self.hooks.buffers)
        self.position = Position()
        self.saved_step = -1
        self.plotted = -math.inf

    def run(self) -> TrainResult:
        self.restore()
        position = self.position
        first_record = (
            position.step + self.is_evaluated
        )  # a resumed run writes again what comes after
        self.log = MetricsLog(self.folder, first_record) if self.backend.main else None
        figures: dict[str, float] = {}
        try:
            with InterruptGuard() as interrupt:
                while position.step < self.last_step:
                    if position.step % self.config.evaluate_every == 0:
                        figures = self.evaluate()
                        if self.is_settled():
                            break
                    self.step()
                    if self.backend.any(interrupt.asked):
                        self.save()
                        raise KeyboardInterrupt(
                            f"stopped after step {position.step} of {self.last_step}, nothing is lost; the same call "
                            "goes on"
                        )
                    if position.step % self.config.checkpoint_every == 0:
                        self.save()
                figures = self.evaluate() or figures
                self.save()
                if position.best is not None:
                    self.load_best()
                    figures = {self.config.keep_best: position.best}
        finally:
            if self.log is not None:
                with suppress(OSError):  # a full disk has been reported; the plot must not hide it
                    self.log.close()
                    plot_losses(self.folder)
        return TrainResult(position, figures)

    @property
    def last_step(self) -> int:
        """Steps after which the run ends, as things stand."""
        return self.position.cooling[1] if self.position.cooling else self.config.steps

    @property
    def is_evaluated(self) -> bool:
        """Whether this step's evaluation is done and counts among those that the best state was
        chosen from.
        """
        return bool(self.config.keep_best) and self.position.evaluated == self.position.step

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        optim = self.config.optim
        position = self.position
        if not position.cooling:
            return learning_rate(optim, position.step, self.config.steps)
        first, last = position.cooling
        return cooling_rate(
            optim, position.step, first, last, learning_rate(optim, first, self.config.steps)
        )

    def is_settled(self) -> bool:
        """Whether to end here, as the figure no longer falls; the first time, begin to cool down
        from the best state.

        At a high rate the figure stops falling long before the text is used up; with a falling one,
        the same state still gains. A run that was never better than at its start has nothing to
        cool down from.
        """
        position = self.position
        config = self.config
        if position.cooling or not config.patience or position.stale < config.patience:
            return False
        steps = round(config.cooldown * position.best_step)
        if steps == 0:
            return True
        self.load_best()
        position.cooling = [position.step, min(config.steps, position.step + steps)]
        self.progress.say(
            f"{config.keep_best.replace('_', ' ')} was lowest after step {position.best_step} of {config.steps}; going "
            f"back there to end with {position.cooling[1] - position.step} steps at a falling rate"
        )
        return False

    def step(self) -> None:
        """Make one optimizer step, or skip it if loss or gradient is not finite or the loss is a
        spike.
        """
        started = time.perf_counter()
        position = self.position
        optim = self.config.optim
        rate = self.rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["pace"]
        loss, tokens, extra = self.backward()
        norm = clip_gradients(self.parameters.values(), optim.clip_norm)
        taken = position.takes(loss, norm)
        position.tokens += tokens
        if taken:
            self.optimizer.step()
        else:
            self.write(position.step - 1, skipped=position.skipped)
        self.optimizer.zero_grad()
        position.check_divergence(optim.learning_rate)
        if taken:
            extra = {**extra, **self.hooks.stepped(rate / optim.learning_rate)}
            speed = tokens / (time.perf_counter() - started)
            self.write(
                position.step - 1,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                tokens=position.tokens,
                tokens_per_second=speed,
                **extra,
            )
            note = f"loss {loss:.3f}  {speed:,.0f} tokens/s"
            self.progress(position.step, self.last_step, "train", note)

    def backward(self) -> tuple[float, int, Mapping[str, float]]:
        """Accumulate the gradients of one step's batches; return its mean loss, its targets and
        further figures.
        """
        losses = []
        tokens = 0
        parts = self.config.accumulate
        for part in range(parts):
            with autocast(self.device):
                batch = self.backend.share(self.batches.next())
                output = self.task.loss(batch, self.position.step * parts + part)
            weight, seen = self.backend.weigh(output.tokens)
            (output.loss * weight / parts).backward()
            losses.append(output.loss.detach() * weight)
            tokens += seen
        return float(self.backend.mean(torch.stack(losses)).mean()), tokens, output.metrics

    def evaluate(self) -> dict[str, float]:
        """Evaluate, record the figures and keep the best state; {} where this step was evaluated
        before.
        """
        if self.is_evaluated:
            return {}
        position = self.position
        wanted = self.config.keep_best
        figures = self.task.evaluate()
        position.evaluated = position.step
        if figures:
            self.write(position.step, **figures)
        if wanted in figures and position.is_best(figures[wanted]):
            self.backend.save(self.best / f"step-{position.step:08d}", self.weights, {})
        if figures and self.backend.main and time.monotonic() > self.plotted + PLOT_SECONDS:
            plot_losses(self.folder)
            self.plotted = time.monotonic()
        self.hooks.evaluated(position.step)
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
            store.prune_before(self.best, store.oldest_step(self.checkpoints))

    def load_best(self) -> None:
        """Put the best weights back."""
        self.backend.load(self.best / f"step-{self.position.best_step:08d}", self.weights)

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
