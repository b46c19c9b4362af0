"""Evaluation as a stage of a recipe."""

import json
from pathlib import Path

import pytest
from tiny_expert import save_base

from deepseek.evaluate import stage
from deepseek.evaluate.code import BodyScores
from deepseek.evaluate.stage import evaluate_stage

CODE = 'def twice(x):\n    """Twice x."""\n    total = x + x\n    return total\n'


def test_paths_in_the_home_folder_are_read_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []

    def score(model: object, tokenizer: object, functions: list, **_: object) -> BodyScores:
        scored.extend(function.name for function in functions)
        return BodyScores(1.0, 1.0, 1.0, len(functions))

    monkeypatch.setattr(stage, "score_bodies", score)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "The router returns. " * 40}))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "twice.py").write_text(CODE)
    evaluate_stage(
        str(save_base(tmp_path / "base")),
        data=["~/texts.jsonl", "texts.jsonl"],
        functions="~/code",
        run_folder="~/run",
        tokens=64,
        quiet=True,
    )
    figures = json.loads((tmp_path / "run" / "result.json").read_text())["figures"]
    # The names are as given: figures are published, and say nothing of this machine.
    assert figures["loss.~/texts.jsonl"] == figures["loss.texts.jsonl"] > 0
    assert scored == ["twice"]
