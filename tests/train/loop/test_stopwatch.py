"""The time of a run is the total of all processes that worked on it."""

from pathlib import Path

import pytest

from deepseek.train.loop import stopwatch
from deepseek.train.loop.position import Position
from deepseek.train.loop.stopwatch import Stopwatch


def test_seconds_of_earlier_processes_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: now)
    first = Stopwatch(tmp_path)
    now += 7
    first.keep()
    now += 2  # lost, since the process is killed
    now += 1000
    second = Stopwatch(tmp_path)
    now += 5
    second.leave_out(1)
    assert (second.here, second.seconds) == (4, 11)
    second.keep()
    assert Stopwatch(tmp_path).seconds == 11


def test_a_figure_that_is_not_finite_is_never_the_best() -> None:
    position = Position(step=1)
    assert [position.is_best(figure) for figure in (float("nan"), 2.0, float("nan"), 1.0)] == [
        False,
        True,
        False,
        True,
    ]
    assert position.best == 1.0
