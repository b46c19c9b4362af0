"""Choose the amount of text, passes and evaluations for a time budget and a measured speed.

A plan is stored in the run folder, so that a resumed run follows the plan of the first call even if
the machine's speed differs.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from deepseek.data import Batch
from deepseek.device.memory import synchronize
from deepseek.errors import TrainError
from deepseek.train.jobs.outcome import MORE

T = TypeVar("T")

MARGIN = 0.05
"""Share of the minutes reserved for unmeasured work: checkpoints, plots, the pack."""

EVALUATION_SHARE = 0.15
"""Largest share of the time for the reported scores before and after training."""

VALIDATION_ROWS = 0.2
"""Validation rows scored per training row. Scoring a row against the whole vocabulary costs nearly
as much as a training step; with the cost of the trunk for both, this is at most a tenth of the
time.
"""

EVALUATIONS_A_PASS = 4

FEWEST_VALIDATION_ROWS = 4
"""Minimum validation rows, if time allows: the loss of one row is too noisy."""

FEWEST_EVALUATIONS = 16
MOST_EVALUATIONS = 33
"""Bounds of the evaluations in a run, regardless of its passes."""


@dataclass(frozen=True)
class Speed:
    """Seconds per packed row.

    Attributes:
        trunk: forward through the frozen layers below the expert; 0 without a cache.
        step: forward and backward through the layers above and the head, and the optimizer's share.
        evaluate: forward through the layers above and the whole head.
    """

    trunk: float
    step: float
    evaluate: float


@dataclass(frozen=True)
class RowCounts:
    """Available packed rows for training, for choosing the best state, and for the report."""

    train: int
    validation: int
    held_out: int


@dataclass(frozen=True)
class TrainingPlan:
    """Amount of work of a run, stored as `plan.json`.

    Attributes:
        rows: distinct packed rows to train on.
        validation_rows: packed rows for choosing the best state.
        held_out_rows: packed rows for the report.
        steps: optimizer steps.
        evaluations: number of times that validation rows are scored, including start and end.
        seconds: estimated duration from now on.
        limit: what bounds the plan: the "text", the "time", or the requested "tokens".
    """

    rows: int
    validation_rows: int
    held_out_rows: int
    steps: int
    evaluations: int
    seconds: float
    limit: Literal["text", "time", "tokens"] = "text"

    @property
    def evaluate_every(self) -> int:
        """Steps from one evaluation to the next, rounded up so that there are no more than
        planned.
        """
        return -(-self.steps // (self.evaluations - 1))


def passes_for(tokens: int) -> float:
    """Return how many passes to plan over a text of `tokens` tokens.

    A small text needs several passes for enough steps. On a large one, each further pass
    generalises less and memorises more. A run whose best state comes earlier ends there (see
    `loop.py`), so that a pass too many costs time, whereas a pass too few costs quality. The
    constants are measured, see docs/log/experts.md.
    """
    return min(MOST_PASSES, max(FEWEST_PASSES, TOKENS_OF_A_RUN / max(1, tokens)))


TOKENS_OF_A_RUN = 200_000
"""Training tokens to aim for, over all passes."""

FEWEST_PASSES = 3.0
MOST_PASSES = 5.0


@dataclass(frozen=True)
class Amount:
    """Amount of training that a request asks for.

    Attributes:
        tokens: distinct tokens to train on; 0 or None: all.
        epochs: passes; None: chosen by the amount of text.
        shortest: minimum number of passes; if the minutes don't suffice for these over all the
            text, less text is used.
        row_length: tokens per packed row.
        batch_rows: rows per batch.
        held_out_tokens: maximum tokens for the report, and for choosing the best state.
    """

    tokens: int | None
    epochs: int | None
    shortest: float
    row_length: int
    batch_rows: int
    held_out_tokens: int

    def passes(self, rows: int) -> float:
        """Return the passes over this many rows."""
        return float(self.epochs) if self.epochs else passes_for(rows * self.row_length)


def make_plan(amount: Amount, seconds: float | None, speed: Speed, rows: RowCounts) -> TrainingPlan:
    """Return the rows, passes and evaluations that fit into a time budget.

    If the text suffices for less than the budget, the run ends early, since further passes would
    not help.

    Args:
        amount: what the request asks for.
        seconds: time budget; None: unlimited.
        speed: measured seconds per row.
        rows: available packed rows.

    Raises:
        TrainError: not even one step fits.
    """
    most = max(1, amount.held_out_tokens // amount.row_length)
    held_out = min(rows.held_out, most)
    reported = speed.trunk + 2 * speed.evaluate
    step = speed.step + VALIDATION_ROWS * (speed.evaluate + speed.trunk / FEWEST_EVALUATIONS)
    train = rows.train
    limit: Literal["text", "time", "tokens"] = "text"
    if amount.tokens and -(-amount.tokens // amount.row_length) < train:
        train = -(-amount.tokens // amount.row_length)
        limit = "tokens"
    row_steps = train * amount.passes(train)
    if seconds is not None:
        held_out = max(1, min(held_out, int(EVALUATION_SHARE * seconds / reported)))
        # Even the shortest run scores one validation row.
        first_row = speed.trunk + MOST_EVALUATIONS * speed.evaluate
        seconds_left = (1 - MARGIN) * seconds - held_out * reported - first_row
        if train * speed.trunk + row_steps * step > seconds_left:
            limit = "time"
            passes = min(amount.shortest, amount.passes(train))
            train = max(1, min(train, int(seconds_left / (speed.trunk + passes * step))))
            row_steps = min(
                (seconds_left - train * speed.trunk) / step, train * amount.passes(train)
            )
    steps = (
        round(row_steps / amount.batch_rows)
        if seconds is None
        else int(row_steps / amount.batch_rows)
    )
    if steps < 1 and seconds is not None and limit == "time":
        raise TrainError(
            f"{seconds:.0f} seconds do not suffice for one training step here; give more minutes."
        )
    steps = max(1, steps)
    evaluations = math.ceil(EVALUATIONS_A_PASS * steps * amount.batch_rows / train)
    evaluations = min(max(FEWEST_EVALUATIONS, evaluations), MOST_EVALUATIONS, steps + 1)
    wanted = int(VALIDATION_ROWS * steps * amount.batch_rows / evaluations)
    validation = max(1, min(rows.validation, most, wanted))
    scored = max(1e-9, speed.trunk + evaluations * speed.evaluate)
    seconds_used = (
        train * speed.trunk
        + steps * amount.batch_rows * speed.step
        + held_out * reported
        + validation * scored
    )
    affordable_rows = (
        FEWEST_VALIDATION_ROWS
        if seconds is None
        else int(max(0.0, (1 - MARGIN) * seconds - seconds_used) / scored)
    )
    missing_rows = max(0, min(FEWEST_VALIDATION_ROWS, rows.validation, most) - validation)
    validation += min(missing_rows, affordable_rows)
    seconds_used += min(missing_rows, affordable_rows) * scored
    return TrainingPlan(
        train, validation, held_out, steps, evaluations, round(seconds_used, 1), limit
    )


def check_tokens(plan: TrainingPlan, row_length: int, fewest: int) -> None:
    """Raise `TrainError` before the training if a plan has too few tokens to calibrate gates.

    Args:
        plan: the plan.
        row_length: tokens per row.
        fewest: minimum number of tokens.
    """
    tokens = plan.rows * row_length
    if tokens < fewest:
        raise TrainError(
            f"The plan has {tokens} tokens to train on, and the gates need at least {fewest}; give "
            f"more {MORE[plan.limit]}."
        )


def timed(
    action: Callable[[Batch], T], warm_up: Batch, batch: Batch, device: torch.device
) -> tuple[float, T]:
    """Return the seconds that `action` takes per row of `batch` after a warm-up call, and its
    result.

    Args:
        action: work on `device`, which may return before it is done.
        warm_up: first batch, not timed.
        batch: timed batch.
        device: device to wait for.
    """
    action(warm_up)
    synchronize(device)
    started = time.perf_counter()
    result = action(batch)
    synchronize(device)
    return (time.perf_counter() - started) / len(batch.row_ids), result
