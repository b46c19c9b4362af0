"""Plans use the time they are given and no more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import TrainError
from deepseek.train.budget import EVALUATION_SHARE, MAX_EPOCHS, Dial, Speed, TextSize, make_plan

SPEEDS = st.builds(
    Speed, trunk=st.floats(0, 2), step=st.floats(0.01, 2), evaluate=st.floats(0.01, 1)
)  # seconds a row of 512 tokens: from a fast card to a busy laptop


def dial(seconds: float | None, tokens: int | None = None, epochs: int = 3) -> Dial:
    return Dial(seconds, tokens, epochs, batch_rows=4, held_out_tokens=8192)


@given(SPEEDS, st.floats(200, 20_000), st.integers(4, 10_000), st.integers(1, 5))
def test_a_plan_fits_its_minutes(speed: Speed, seconds: float, rows: int, epochs: int) -> None:
    plan = make_plan(dial(seconds, epochs=epochs), speed, TextSize(rows, 500, 512))
    assert 1 <= plan.rows <= rows and plan.steps >= 1
    assert plan.seconds <= seconds * 1.001
    evaluation = plan.held_out_rows * (speed.trunk + plan.evaluations * speed.evaluate)
    assert evaluation <= EVALUATION_SHARE * seconds or plan.held_out_rows == 1
    assert plan.steps * 4 <= MAX_EPOCHS * plan.rows
    used_up = plan.rows == rows or plan.seconds >= 0.7 * seconds
    assert used_up, "time was left over although there was text"


@given(SPEEDS, st.integers(0, 10**6), st.integers(1, 5))
def test_a_token_dial_fixes_rows_and_passes(speed: Speed, tokens: int, epochs: int) -> None:
    plan = make_plan(dial(None, tokens, epochs), speed, TextSize(300, 500, 512))
    assert plan.rows == (min(300, -(-tokens // 512)) if tokens else 300)
    assert abs(plan.steps * 4 - plan.rows * epochs) <= 4
    assert plan.held_out_rows == 16


def test_more_minutes_never_mean_less_training() -> None:
    speed, text = Speed(0.9, 0.3, 0.4), TextSize(2000, 100, 512)
    steps = [make_plan(dial(seconds), speed, text).steps for seconds in (150, 300, 890, 950, 3600)]
    assert steps == sorted(steps)


def test_too_few_minutes_are_one_sentence() -> None:
    with pytest.raises(TrainError, match="do not suffice for one training step here; give more minutes"):
        make_plan(dial(2), Speed(5, 5, 5), TextSize(100, 10, 512))
