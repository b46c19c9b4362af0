"""Training plans use as much time as the text is worth, and no more."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.checkpoint.store import write_json
from deepseek.errors import TrainError
from deepseek.train.jobs.plan import (
    EVALUATION_SHARE,
    FEWEST_PASSES,
    MOST_PASSES,
    VALIDATION_ROWS,
    Amount,
    RowCounts,
    Speed,
    TrainingPlan,
    make_plan,
    passes_for,
)
from deepseek.train.jobs.text_run import evaluation_interval

# Seconds per row of 512 tokens: from a fast GPU to a busy laptop.
SPEEDS = st.builds(
    lambda trunk, step, evaluate: Speed(trunk, step, evaluate * step),
    trunk=st.floats(0, 2),
    step=st.floats(0.01, 2),
    evaluate=st.floats(0.2, 0.9),
)


def plan_of(
    speed: Speed,
    seconds: float | None,
    rows: int,
    tokens: int | None = None,
    epochs: int | None = None,
    held_out_rows: int = 500,
) -> TrainingPlan:
    amount = Amount(tokens, epochs, shortest=3, row_length=512, batch_rows=4, held_out_tokens=8192)
    return make_plan(amount, seconds, speed, RowCounts(rows, held_out_rows, held_out_rows))


@given(SPEEDS, st.floats(200, 20_000), st.integers(4, 10_000), st.none() | st.integers(1, 5))
def test_a_plan_fits_its_minutes(
    speed: Speed, seconds: float, rows: int, epochs: int | None
) -> None:
    plan = plan_of(speed, seconds, rows, epochs=epochs)
    assert 1 <= plan.rows <= rows and plan.steps >= 1
    assert plan.seconds <= seconds * 1.001
    made = 1 + -(-plan.steps // plan.evaluate_every)  # at the start, and at the end
    assert plan.evaluations / 2 < made <= plan.evaluations
    reported = plan.held_out_rows * (speed.trunk + 2 * speed.evaluate)
    assert reported <= EVALUATION_SHARE * seconds or plan.held_out_rows == 1
    passes = epochs or passes_for(plan.rows * 512)
    assert plan.steps * 4 <= passes * plan.rows + 4
    text_used_up = plan.rows == rows and plan.steps * 4 >= passes * plan.rows - 4
    assert text_used_up or plan.seconds >= 0.7 * seconds, (
        "time was left over although there was text"
    )
    assert (plan.limit == "text") == (text_used_up and plan.limit != "time")


@given(SPEEDS, st.floats(200, 20_000), st.integers(4, 10_000))
def test_choosing_the_best_state_costs_little(speed: Speed, seconds: float, rows: int) -> None:
    plan = plan_of(speed, seconds, rows)
    scored = plan.validation_rows * plan.evaluations
    assert scored <= VALIDATION_ROWS * plan.steps * 4 or plan.validation_rows <= 4
    assert plan.evaluations >= min(16, plan.steps + 1)
    assert plan.evaluations >= min(4 * plan.steps * 4 / plan.rows, 33, plan.steps + 1)


@given(SPEEDS, st.integers(0, 10**6), st.integers(1, 5))
def test_a_token_dial_fixes_rows_and_passes(speed: Speed, tokens: int, epochs: int) -> None:
    plan = plan_of(speed, None, 300, tokens, epochs)
    assert plan.rows == (min(300, -(-tokens // 512)) if tokens else 300)
    assert abs(plan.steps * 4 - plan.rows * epochs) <= 4
    assert plan.held_out_rows == 16
    assert plan == plan_of(Speed(0.0, 0.0, 0.0), None, 300, tokens, epochs) or plan.seconds, (
        "speed decides nothing"
    )


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_more_text_needs_fewer_passes(fewer: int, more: int) -> None:
    fewer, more = sorted((fewer, more))
    assert MOST_PASSES >= passes_for(fewer) >= passes_for(more) >= FEWEST_PASSES


def test_a_training_that_has_begun_keeps_its_interval(tmp_path: Path) -> None:
    plan = replace(plan_of(Speed(0.0, 1.0, 0.3), 2_000, 500), steps=98, evaluations=17)
    assert evaluation_interval(plan, tmp_path) == 7
    write_json(tmp_path / "config.json", {"steps": 98, "evaluate_every": 6})
    assert evaluation_interval(plan, tmp_path) == 6
    assert evaluation_interval(replace(plan, steps=99), tmp_path) == 7


def test_more_minutes_never_mean_less_training() -> None:
    speed = Speed(0.9, 0.3, 0.4)
    steps = [
        plan_of(speed, seconds, 2000, held_out_rows=100).steps
        for seconds in (150, 300, 890, 950, 3600)
    ]
    assert steps == sorted(steps)


def test_minutes_beyond_what_the_text_is_worth_are_not_used() -> None:
    speed = Speed(0.9, 0.3, 0.4)
    assert plan_of(speed, 3600, 50) == plan_of(speed, 36_000, 50)
    assert plan_of(speed, 3600, 50).limit == "text"


def test_too_few_minutes_are_one_sentence() -> None:
    with pytest.raises(
        TrainError, match="do not suffice for one training step here; give more minutes"
    ):
        plan_of(Speed(5, 5, 5), 2, 100, held_out_rows=10)
