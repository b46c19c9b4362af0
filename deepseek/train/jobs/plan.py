"""How much text, how many passes and how many evaluations: from the amount of text, the minutes and
the measured speed.

A plan is made once and kept in the run folder, so that a resumed run does exactly what the first
call set out to do, however fast the machine is then.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from deepseek.data import Batch
from deepseek.errors import TrainError

T = TypeVar("T")

MARGIN = 0.05
"""Share of the minutes left for what is not measured: checkpoints, plots, the pack."""

EVALUATION_SHARE = 0.15
"""Most of the time that the reported figures, before and after, may take."""

VALIDATION_ROWS = 0.2
"""Validation rows scored for each row trained on. The whole head makes scoring a row nearly as dear
as training on one: with the trunk below both, this is a tenth of the time at most."""

EVALUATIONS_A_PASS = 4

FEWEST_VALIDATION_ROWS = 4
"""Where there is time for them: one row alone says little."""

FEWEST_EVALUATIONS = 16
MOST_EVALUATIONS = 33
"""Of a run, whatever its passes."""


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
class RowCounts:
    """Packed rows there are to train on, to choose the best state by, and to report on."""

    train: int
    validation: int
    held_out: int


@dataclass(frozen=True)
class TrainingPlan:
    """What a run will do; stored as `plan.json`.

    Attributes:
        rows: distinct packed rows to train on.
        validation_rows: packed rows that the best state is chosen by.
        held_out_rows: packed rows to report on.
        steps: optimizer steps.
        evaluations: how often validation rows are scored, the start and the end included.
        seconds: estimated duration from here.
        limit: what ended the plan: the "text", the "time", or the "tokens" asked for.
    """

    rows: int
    validation_rows: int
    held_out_rows: int
    steps: int
    evaluations: int
    seconds: float
    limit: Literal["text", "time", "tokens"] = "text"


def passes_for(tokens: int) -> float:
    """Return how many passes over a text of this many tokens are worth planning.

    A small text needs passes to get its steps at all; of a large one, what is still learned falls
    with every pass and what is learned by heart rises. A run that is at its best earlier ends there
    (see `loop.py`): a pass too many costs time, a pass too few costs gain. Measured, see
    docs/log/experts.md.
    """
    return min(MOST_PASSES, max(FEWEST_PASSES, TOKENS_OF_A_RUN / max(1, tokens)))


TOKENS_OF_A_RUN = 200_000
"""Tokens that a run should see, all passes together."""

FEWEST_PASSES = 3.0
MOST_PASSES = 5.0


@dataclass(frozen=True)
class Amount:
    """How much a request wants.

    Attributes:
        tokens: distinct tokens to train on; 0 or None: all there are.
        epochs: passes over them; None: as many as the text is worth.
        shortest: passes that a text is to get at least where the minutes do not suffice for all of
            it.
        row_length, batch_rows: tokens of a packed row, rows of a batch.
        held_out_tokens: most tokens that are reported on, and most that the best state is chosen
            by.
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
    """Return how many rows, passes and evaluations fit; raise `TrainError` if not a single step
    does.

    Text that is used up in fewer minutes than there are ends the run early: further passes would
    not help it.

    Args:
        seconds: time left for all of it; None: as long as the tokens of the request take.
        rows: packed rows there are.
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
        first_row = (
            speed.trunk + MOST_EVALUATIONS * speed.evaluate
        )  # one row is scored, however short the run
        left = (1 - MARGIN) * seconds - held_out * reported - first_row
        if train * speed.trunk + row_steps * step > left:
            limit = "time"
            passes = min(amount.shortest, amount.passes(train))
            train = max(1, min(train, int(left / (speed.trunk + passes * step))))
            row_steps = min((left - train * speed.trunk) / step, train * amount.passes(train))
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
    taken = (
        train * speed.trunk
        + steps * amount.batch_rows * speed.step
        + held_out * reported
        + validation * scored
    )
    spare = (
        FEWEST_VALIDATION_ROWS
        if seconds is None
        else int(max(0.0, (1 - MARGIN) * seconds - taken) / scored)
    )
    few = max(0, min(FEWEST_VALIDATION_ROWS, rows.validation, most) - validation)
    validation += min(few, spare)
    taken += min(few, spare) * scored
    return TrainingPlan(train, validation, held_out, steps, evaluations, round(taken, 1), limit)


def timed(action: Callable[[Batch], T], warm_up: Batch, batch: Batch) -> tuple[float, T]:
    """Return the seconds that `action` takes for each row of `batch`, after a call on `warm_up`,
    and its result.
    """
    action(warm_up)
    started = time.perf_counter()
    result = action(batch)
    return (time.perf_counter() - started) / len(batch.row_ids), result
