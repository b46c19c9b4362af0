"""The summary of a training run."""

from hypothesis import given
from hypothesis import strategies as st

from deepseek.packs.manifest import Metric
from deepseek.train.jobs.outcome import NO_GAIN, tell
from deepseek.train.loop.position import Position


def test_the_story_of_a_run() -> None:
    def story(
        best_step: int, step: int, limit: str = "text", cooling: list[int] | None = None
    ) -> str:
        return tell(Position(step=step, best_step=best_step, cooling=cooling or []), 60, 10, limit)

    assert story(0, 40) == NO_GAIN
    assert story(21, 60) == "best after 2.1 of 6.0 passes; more text would help more than more time"
    assert (
        story(60, 60) == "best at the end of 6.0 passes; more text would help more than more time"
    )
    assert (
        story(60, 60, "time") == "still falling at the end of 6.0 passes; more minutes would help"
    )
    assert (
        story(60, 60, "tokens") == "still falling at the end of 6.0 passes; more tokens would help"
    )
    assert "had stopped falling by 3.0" in story(36, 37, "time", [30, 37])


LOSS = st.floats(0.01, 20)


@given(LOSS, LOSS)
def test_the_verdict_has_the_sign_of_the_gain(before: float, after: float) -> None:
    metric = Metric(before=before, after=after)
    word = metric.verdict.split()[0]
    assert word in {"better", "worse", "no"}
    if word == "better":
        assert after < before
    elif word == "worse":
        assert after > before
    else:
        assert abs(after / before - 1) < 0.001


def test_verdicts_in_words() -> None:
    assert Metric(before=2.0, after=1.648).verdict == "better by 17.6 %"
    assert Metric(before=2.0, after=2.1).verdict == "worse by 5.0 %"
    assert Metric(before=2.0, after=2.0).verdict == "no better than the base"
