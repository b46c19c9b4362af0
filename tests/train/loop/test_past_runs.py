"""Summaries of past runs."""

from pathlib import Path

import pytest

from deepseek.checkpoint.store import home, write_json
from deepseek.train.loop.past_runs import summary, unfinished_on


def test_the_figures_of_an_updated_expert_are_those_of_the_last_update(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"after": 3.0, "verdict": "5.9 %", "pack": "new"})
    updates = {"b": (1, 2.5), "a": (2, 2.0)}
    for name, (number, loss) in updates.items():
        record = {"after": loss, "verdict": "24.0 %", "update": number, "pack": "old"}
        write_json(tmp_path / "updates" / name / "result.json", record)
    write_json(tmp_path / "updates" / "c" / "start.json", {})  # unfinished
    figures = {"after": 2.0, "verdict": "24.0 %", "update": 2, "pack": "new"}
    assert summary(tmp_path) == {"state": "finished", **figures}


@pytest.mark.parametrize("by_folder", [True, False])
def test_a_run_uses_a_base_by_name_or_by_folder(by_folder: bool) -> None:
    model = home() / "models" / "mine"
    write_json(model / "config.json", {})
    base = str(model) if by_folder else "mine"
    write_json(home() / "runs" / "half" / "request.json", {"base": base})
    assert unfinished_on("mine") == ["half"] and unfinished_on("other") == []
