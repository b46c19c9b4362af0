"""Progress without a terminal, and metrics that survive a crash."""

import io
from pathlib import Path

import pytest

from deepseek.train.loop import progress
from deepseek.train.loop.metrics import MetricsLog, read_metrics
from deepseek.train.loop.progress import ProgressBar


class Clock:
    """A clock that advances by one second at every call."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


def test_without_a_terminal_there_is_a_line_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "time", Clock())
    stream = io.StringIO()
    with ProgressBar(stream) as bar:
        for done in range(1, 41):
            bar(done, 40, "train", "loss 1.0")
        bar(1, 0, "clean")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("train: 1/40") and lines[-1] == "clean: 1"
    assert lines[-2] == "train: 40/40 100%  loss 1.0"
    assert 7 <= len(lines) <= 12
    assert "train: 16/40  40%, 0:00:01 left  loss 1.0" in lines


def test_quiet_is_silent() -> None:
    stream = io.StringIO()
    with ProgressBar(stream, quiet=True) as bar:
        bar(1, 2, "train")
        bar.say("done")
    assert stream.getvalue() == ""


def test_a_resumed_log_tells_no_step_twice(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(6):
        log.write(step, loss=float(step))
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')  # as after a crash
    again = MetricsLog(tmp_path, 4)
    again.write(4, loss=40.0)
    again.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(log.path)] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
