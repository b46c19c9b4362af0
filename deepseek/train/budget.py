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


@dataclass(frozen=True)
class Dial:
    """What the user asks for; one of `seconds` and `tokens` is given.

    Attributes:
        seconds: time left for all of it.
        tokens: distinct tokens to train on; 0 means all.
        epochs: passes over them.
        batch_rows: packed rows of a batch.
        held_out_tokens: most tokens an evaluation covers.
    """

    seconds: float | None
    tokens: int | None
    epochs: int
    batch_rows: int
    held_out_tokens: int


@dataclass(frozen=True)
class TextSize:
    """Packed rows there are to train on and to evaluate on, and tokens in each."""

    rows: int
    held_out_rows: int
    length: int


def make_plan(dial: Dial, speed: Speed, text: TextSize) -> Plan:
    """Return how many rows, passes and evaluations fit; raise `TrainError` if not a single step does."""
    held_out = min(text.held_out_rows, max(1, dial.held_out_tokens // text.length))
    evaluations = 2 if dial.seconds is None or dial.seconds <= LONG_RUN else 3
    if dial.seconds is None:
        rows = min(text.rows, -(-dial.tokens // text.length)) if dial.tokens else text.rows
        steps = max(1, round(rows * dial.epochs / dial.batch_rows))
        return Plan(rows, held_out, steps, evaluations, _seconds(rows, held_out, steps, evaluations, dial, speed))
    per_held_out = speed.trunk + speed.evaluate * evaluations
    held_out = max(1, min(held_out, int(EVALUATION_SHARE * dial.seconds / per_held_out)))
    seconds = (1 - MARGIN) * dial.seconds - held_out * per_held_out
    rows = max(min(int(seconds / (speed.trunk + dial.epochs * speed.step)), text.rows), 1)
    passes = min((seconds - rows * speed.trunk) / speed.step, MAX_EPOCHS * rows)
    steps = int(passes / dial.batch_rows)
    if steps < 1:
        raise TrainError(f"{dial.seconds:.0f} seconds do not suffice for one training step here; give more minutes.")
    return Plan(rows, held_out, steps, evaluations, _seconds(rows, held_out, steps, evaluations, dial, speed))


def _seconds(rows: int, held_out: int, steps: int, evaluations: int, dial: Dial, speed: Speed) -> float:
    """Return the estimated duration of a plan."""
    trunk = (rows + held_out) * speed.trunk
    return round(trunk + steps * dial.batch_rows * speed.step + held_out * evaluations * speed.evaluate, 1)


def timed(action: Callable[[Batch], T], warm_up: Batch, batch: Batch) -> tuple[float, T]:
    """Return the seconds that `action` takes for each row of `batch`, after a call on `warm_up`, and its result."""
    action(warm_up)
    started = time.perf_counter()
    result = action(batch)
    return (time.perf_counter() - started) / len(batch.row_ids), result
