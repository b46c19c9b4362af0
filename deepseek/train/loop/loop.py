"""The training loop: a task defines what to train and how to score it, the loop does the rest.

A run has a folder: `config.json` (resolved), `metrics.jsonl`, `loss.png`, `tensorboard/` and
`checkpoints/`. Calling `train` again with the same arguments resumes from the newest checkpoint. A
resumed run ends with the same bits as an uninterrupted one, since weights, moments, random state
and data position are all restored.

A run may keep its best state (`LoopConfig.keep_best`): `best/` holds the weights at the lowest
held-out figure, and the task has these weights when `train` returns. Once the figure stops falling,
the run returns to them a single time, cools down over a few more steps, and stops.
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
"""Seconds between two plots; drawing one takes as long as several steps."""

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)
B_contra = TypeVar("B_contra", contravariant=True)


@dataclass(frozen=True)
class LossOutput:
    """Loss of one batch.

    Attributes:
        loss: scalar to minimise, in nats per target.
        tokens: number of targets that the loss is averaged over.
        metrics: further figures to record.
    """

    loss: Tensor
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Batches(Protocol[B_co]):
    """An endless stream of batches whose position is a few integers, such as `data.RowLoader`."""

    def next(self) -> B_co: ...
    def state(self) -> dict[str, int]: ...
    def load(self, state: dict[str, int]) -> None: ...


class Task(Protocol[B_contra]):
    """What to train and how to score it.

    `loss` chooses its own precision. It may depend on the step (counted in batches) but not on
    hidden state of its own, or resumed runs would differ. `evaluate` is called between steps and
    returns named figures, including `held_out_loss` if there is held-out text.
    """

    @property
    def parameters(self) -> dict[str, nn.Parameter]: ...
    def loss(self, batch: B_contra, step: int) -> LossOutput: ...
    def evaluate(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Hooks:
    """Callbacks and state that a task adds to the loop.

    Attributes:
        buffers: tensors besides the parameters that training changes; checkpoints include them.
        stepped: called after every optimizer step with the learning rate as a share of its peak;
            returns figures to record.
        evaluated: called after every evaluation with the number of finished steps.
    """

    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    stepped: Callable[[float], Mapping[str, float]] = lambda _: {}
    evaluated: Callable[[int], object] = int


@dataclass(frozen=True)
class LoopConfig:
    """Length of a run, and intervals of evaluations and checkpoints.

    Attributes:
        optim: optimizer and schedule.
        steps: total optimizer steps.
        accumulate: batches per step.
        evaluate_every: steps between evaluations; there is one before the first and one after the
            last step.
        checkpoint_every: steps between checkpoints.
        keep: number of checkpoints to keep.
        seed: seed of PyTorch's random numbers.
        keep_best: evaluation figure whose lowest value selects the final weights; "" ends with the
            last weights.
        patience: consecutive evaluations without a lower figure before the cool-down; 0: no early
            stop.
        cooldown: steps of the cool-down as a share of the steps up to the best state.
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
    """Final position of a run and its last evaluation; with `keep_best`, the figure of the best
    state.
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
    """Train `task` for `config.steps` steps or until its figure stops falling.

    The run resumes from the newest checkpoint in `folder`.

    Args:
        task: what to train.
        batches: training data.
        config: length, intervals, optimizer and seed.
        folder: folder of the run.
        progress: shows the steps.
        hooks: callbacks and state of the task; default: none.
        backend: a single process, or many that share every batch and shard every parameter.

    Raises:
        TrainError: the run in `folder` had another configuration, it diverged, or the disk is full.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the step is finished and checkpointed.
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
        self.optimizer = adamw(self.parameters, self.config.optim)
        self.state = TrainingState(self.parameters, self.hooks.buffers, self.optimizer)
        self.weights = Weights(self.parameters, self.hooks.buffers)
        self.position = Position()
        self.saved_step = -1
        self.plotted = -math.inf

    def run(self) -> TrainResult:
        self.restore()
        position = self.position
        # Later records are dropped: a resumed run writes them again.
        first_record = position.step + self.is_evaluated
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
                            f"stopped after step {position.step} of {self.last_step}, "
                            "nothing is lost; the same call resumes the run"
                        )
                    if position.step % self.config.checkpoint_every == 0:
                        self.save()
                figures = self.evaluate() or figures
                self.save()
                if self.backend.any(interrupt.asked):
                    raise KeyboardInterrupt(
                        "stopped after the last step, nothing is lost; the same call resumes the "
                        "run"
                    )
                if position.best is not None:
                    self.load_best()
                    figures = {self.config.keep_best: position.best}
        finally:
            if self.log is not None:
                with suppress(OSError):  # don't mask the error of a full disk
                    self.log.close()
                    plot_losses(self.folder)
        return TrainResult(position, figures)

    @property
    def last_step(self) -> int:
        """Step at which the run currently plans to end."""
        return self.position.cooling[1] if self.position.cooling else self.config.steps

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluation at this step is done and has been compared with the best state."""
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
        """Return whether to end the run; start the cool-down the first time that the figure stalls.

        At a high learning rate the figure stalls long before the text is used up, and a decaying
        rate still lowers it from the best state. A run whose best state is its start has nothing to
        cool down from. It ends at half of its steps at the earliest: the first ones, at the highest
        rates, can raise the figure above that of the start, and later ones lower it again.
        """
        position = self.position
        config = self.config
        if position.cooling or not config.patience or position.stale < config.patience:
            return False
        steps = round(config.cooldown * position.best_step)
        if steps == 0:
            return position.step >= config.steps / 2
        self.load_best()
        position.cooling = [position.step, min(config.steps, position.step + steps)]
        self.progress.say(
            f"{config.keep_best.replace('_', ' ')} was lowest after step {position.best_step} of "
            f"{config.steps}; returning there for a cool-down of "
            f"{position.cooling[1] - position.step} steps"
        )
        return False

    def step(self) -> None:
        """Make one optimizer step; skip it if loss or gradient is not finite, or the loss is a
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
        applied = position.takes(loss, norm)
        if applied:
            position.tokens += tokens
            self.optimizer.step()
        else:
            self.write(position.step - 1, skipped=position.skipped)
        self.optimizer.zero_grad()
        position.check_divergence(optim.learning_rate)
        if applied:
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
        """Accumulate the gradients of one step; return its mean loss, targets and further
        figures.

        Each target counts the same, in whichever part and process it is.
        """
        losses = []
        tokens = 0
        parts = self.config.accumulate
        for part in range(parts):
            batch = self.backend.share(self.batches.next())
            output = self.task.loss(batch, self.position.step * parts + part)
            weight, part_tokens = self.backend.weigh(output.tokens)
            summed = output.loss * weight * part_tokens
            summed.backward()
            losses.append(summed.detach())
            tokens += part_tokens
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad /= max(1, tokens)
        loss = float(self.backend.mean(torch.stack(losses)).sum()) / max(1, tokens)
        return loss, tokens, output.metrics

    def evaluate(self) -> dict[str, float]:
        """Evaluate, record the figures and save the best state; return {} if that is done for this
        step.
        """
        if self.is_evaluated:
            return {}
        position = self.position
        criterion = self.config.keep_best
        figures = self.task.evaluate()
        position.evaluated = position.step
        if figures:
            self.write(position.step, **figures)
        if criterion in figures and position.is_best(figures[criterion]):
            self.backend.save(self.best / f"step-{position.step:08d}", self.weights, {})
        if figures and self.backend.main and time.monotonic() > self.plotted + PLOT_SECONDS:
            plot_losses(self.folder)
            self.plotted = time.monotonic()
        self.hooks.evaluated(position.step)
        return figures

    def write(self, step: int, **figures: float) -> None:
        """Record figures; only the main process writes."""
        if self.log is not None:
            self.log.write(step, **figures)

    def save(self) -> None:
        """Write a checkpoint unless this step has one, then delete old ones."""
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
        """Restore the best weights."""
        self.backend.load(self.best / f"step-{self.position.best_step:08d}", self.weights)

    def restore(self) -> None:
        """Resume from the newest checkpoint, or seed a new run."""
        torch.manual_seed(self.config.seed)
        newest = store.latest_state(self.checkpoints)
        if newest is None:
            if self.backend.main:  # of a run that ended before its first checkpoint
                store.prune_after(self.best, -1)
            return
        meta = self.backend.load(newest, self.state)
        self.batches.load(meta["batches"])
        self.position = Position(**meta["position"])
        self.saved_step = self.position.step
        if self.backend.main:  # the steps that are made again may have other best states
            store.prune_after(self.best, self.position.step)
        self.progress.say(f"resuming after step {self.position.step} of {self.config.steps}")
