"""Plans use the time they are given and no more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import TrainError
from deepseek.train.corpus import Source
from deepseek.train.text_run import EVALUATION_SHARE, MAX_EPOCHS, Plan, Speed, TextRequest, make_plan

SPEEDS = st.builds(
    Speed, trunk=st.floats(0, 2), step=st.floats(0.01, 2), evaluate=st.floats(0.01, 1)
)  # seconds a row of 512 tokens: from a fast card to a busy laptop


def plan_of(
    speed: Speed, seconds: float | None, rows: int, tokens: int | None = None, epochs: int = 3, held_out_rows: int = 500
) -> Plan:
    request = TextRequest(
        base="", source=Source(), tokens=tokens, epochs=epochs, row_length=512, batch_rows=4, learning_rate=1e-3,
        held_out_tokens=8192, seed=0,
    )  # fmt: skip
    return make_plan(request, seconds, speed, rows, held_out_rows)


@given(SPEEDS, st.floats(200, 20_000), st.integers(4, 10_000), st.integers(1, 5))
def test_a_plan_fits_its_minutes(speed: Speed, seconds: float, rows: int, epochs: int) -> None:
    plan = plan_of(speed, seconds, rows, epochs=epochs)
    assert 1 <= plan.rows <= rows and plan.steps >= 1
    assert plan.seconds <= seconds * 1.001
    evaluation = plan.held_out_rows * (speed.trunk + plan.evaluations * speed.evaluate)
    assert evaluation <= EVALUATION_SHARE * seconds or plan.held_out_rows == 1
    assert plan.steps * 4 <= MAX_EPOCHS * plan.rows
    used_up = plan.rows == rows or plan.seconds >= 0.7 * seconds
    assert used_up, "time was left over although there was text"


@given(SPEEDS, st.integers(0, 10**6), st.integers(1, 5))
def test_a_token_dial_fixes_rows_and_passes(speed: Speed, tokens: int, epochs: int) -> None:
    plan = plan_of(speed, None, 300, tokens, epochs)
    assert plan.rows == (min(300, -(-tokens // 512)) if tokens else 300)
    assert abs(plan.steps * 4 - plan.rows * epochs) <= 4
    assert plan.held_out_rows == 16


def test_more_minutes_never_mean_less_training() -> None:
    speed = Speed(0.9, 0.3, 0.4)
    steps = [plan_of(speed, seconds, 2000, held_out_rows=100).steps for seconds in (150, 300, 890, 950, 3600)]
    assert steps == sorted(steps)


def test_too_few_minutes_are_one_sentence() -> None:
    with pytest.raises(TrainError, match="do not suffice for one training step here; give more minutes"):
        plan_of(Speed(5, 5, 5), 2, 100, held_out_rows=10)
