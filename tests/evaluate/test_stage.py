"""Evaluation as a stage of a recipe."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_expert import save_base

import deepseek
from deepseek.data import Document, TokenShards
from deepseek.errors import DataError
from deepseek.evaluate import quality, stage
from deepseek.evaluate.code import BodyScores
from deepseek.evaluate.stage import evaluate_stage


def evaluated(base: Path, folder: Path, **given: object) -> dict[str, float]:
    evaluate_stage(str(base), run_folder=folder, tokens=64, quiet=True, **given)
    return dict(json.loads((folder / "result.json").read_text())["figures"])


def test_what_a_training_has_learnt_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matched by name, or by text under another name."""
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    base = save_base(tmp_path / "base")
    (tmp_path / "src").mkdir()
    for number in range(12):
        (tmp_path / "src" / f"{number}.py").write_text(f"value_{number} = router\n" * 60)
    run = tmp_path / "run"
    request = {"tokens": 512, "row_length": 64, "epochs": 1, "held_out": 0.3, "quiet": True}
    source = tmp_path / "src"
    deepseek.train_expert(str(base), name="own", from_folder=source, run_folder=run, **request)
    notes = json.loads((run / "corpus" / "corpus.json").read_text())
    seen: list[str] = []

    def build(documents: list[Document], *rest: object, **named: object) -> TokenShards:
        seen.extend(document.name for document in documents)
        return TokenShards.build(documents, *rest, **named)

    monkeypatch.setattr(quality, "TokenShards", SimpleNamespace(build=build))
    monkeypatch.setattr(quality, "public_documents", dict)
    evaluated(base, tmp_path / "a", data=[tmp_path / "src"], without=[run])
    assert seen and not set(seen) & set(notes["train_names"])
    assert set(seen) < {f"src/{number}.py" for number in range(12)}
    for place, text in (("copied", 0), ("all", 12)):
        (tmp_path / place).mkdir()
        for number in range(12):
            name = f"src/{number}.py"
            if text or name in notes["train_names"]:
                (tmp_path / place / f"other_{number}.py").write_text(
                    f"value_{number} = router\n" * 60
                )
    with pytest.raises(DataError, match="was trained on"):
        evaluated(base, tmp_path / "b", data=[tmp_path / "copied"], without=[run])
    seen.clear()
    evaluated(base, tmp_path / "c", data=[tmp_path / "all"], without=[run])
    assert 0 < len(seen) < 12


def test_finished_figures_stand_for_the_same_question_alone(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "The router returns. " * 40}))
    figures = evaluated(base, tmp_path / "run", data=[text])
    text.unlink()  # the measured text may be gone
    assert evaluated(base, tmp_path / "run", data=[text]) == figures
    with pytest.raises(DataError, match="other"):
        evaluated(base, tmp_path / "run", data=[tmp_path / "other.jsonl"])


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
    # Names are as given: figures are published and must not reveal local paths.
    assert figures["loss.~/texts.jsonl"] == figures["loss.texts.jsonl"] > 0
    assert scored == ["twice"]
