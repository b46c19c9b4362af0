"""From minutes to a fixed plan: how many rows, how many passes, measured on this machine.

The plan is made once and kept in the run folder, so that a resumed run does exactly what the first call set out to do
however fast the machine is by then.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from deepseek.data.loader import Batch
from deepseek.errors import TrainError
from deepseek.train.text_run import TextRequest

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
