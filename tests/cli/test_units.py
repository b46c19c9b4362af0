"""Figures with units, and what a command waits for."""

import pytest

from deepseek.cli.units import duration, size, with_unit
from deepseek.cli.waiting import Waiting


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("seconds", 3.25, "3.2 s"),
        ("training_seconds", 270.4, "4 min 30 s"),
        ("seconds", 7384.0, "2:03:04"),
        ("peak_memory", 2_500_000_000, "2.5 GB"),
        ("num_bytes", 16_000_000, "16.0 MB"),
        ("held_out_loss", 2.34567, "2.3457 nats per token"),
        ("before", 3.5, "3.5000 nats per token"),
        ("recall", 0.953, "95.3%"),
        ("tokens", 1234567, "1,234,567"),
        ("learning_rate", 0.004, "0.004"),
        ("verdict", "better by 4.5 %", "better by 4.5 %"),
        ("cooling", True, "True"),
        ("seconds", float("nan"), "nan"),
        ("num_bytes", float("inf"), "inf"),
    ],
)
def test_a_figure_has_the_unit_that_its_name_implies(name: str, value: object, shown: str) -> None:
    assert with_unit(name, value) == shown


def test_durations_and_sizes_change_their_unit() -> None:
    assert [duration(59.94), duration(60), duration(3600)] == ["59.9 s", "1 min 0 s", "1:00:00"]
    assert [duration(9e8), duration(1e300)] == ["1.04e+04 days", "1.16e+295 days"]
    assert duration(float("inf")) == "inf days"
    assert [size(999_000), size(1e9)] == ["1.0 MB", "1.0 GB"]


def test_each_step_is_said_once_and_the_end_with_its_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    waiting = Waiting()
    for step in ("loading tiny", "loading tiny", "packing the weights"):
        waiting(0, 0, step)
    waiting(1, 1, "ready")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["loading tiny ...", "packing the weights ..."]
    assert lines[2].startswith("ready after 0.")
