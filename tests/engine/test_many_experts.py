"""`benchmarks/many_experts.py` runs end to end, here with a tiny model and few experts."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny_expert import save_expert

from deepseek.engine.load import Loaded
from deepseek.model.experts import ExpertModule
from deepseek.model.experts.relevance import Relevance
from deepseek.packs.pack import read_pack, write_pack

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORDS = {
    "code": "def return yield import ",
    "rain": "rain wind cloud storm ",
    "public": "a bc def ",
}


def save_texts(folder: Path) -> None:
    for name, words in WORDS.items():
        (folder / name).mkdir(parents=True)
        for number in range(30):
            text = f"{number} is the file. " + " ".join([words, str(number)] * 20)
            (folder / name / f"{number}.txt").write_text(text)


def save_pack(loaded: Loaded, name: str, folder: Path) -> None:
    """Write an expert with a relevance table for its own words."""
    path = save_expert(loaded, name, folder, seed=len(name))
    module = ExpertModule.from_pack(read_pack(path))
    table_V = torch.full((loaded.model.config.vocab_size,), -1.0)
    table_V[torch.tensor(loaded.tokenizer.encode(WORDS[name]))] = 1.0
    module.relevance = Relevance(table_V, 0.0, 0.0)
    write_pack(path, module.to_pack(loaded.model.experts.base, "Apache-2.0"))


def test_it_measures_all_that_it_says(
    loaded: Loaded, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = tmp_path / "packs"
    packs.mkdir()
    for name in ("code", "rain"):
        save_pack(loaded, name, packs)
    save_texts(tmp_path / "texts")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    words = ["benchmarks/many_experts.py", "--packs", packs, "--texts", tmp_path / "texts"]
    words += ["--base", base_folder, "--counts", 1, 5, "--room", 2, "--rounds", 1]
    words += ["--passages", 1, "--tokens", 4, "--length", 20, "--longer", 24, "--width", 8]
    words += ["--json", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    runpy.run_path(str(BENCHMARKS / "many_experts.py"), run_name="__main__")
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["commit"]
    figures = record["figures"]
    assert figures["experts"] == 2
    for count in ("1", "5"):
        row = figures[count]
        assert row["plug"]["first_ms"] > 0
        for kind in ("conversation", "document"):
            timed = row["overhead"][kind]
            # With five, noisy copies may be chosen instead of the passages' own experts.
            assert count == "5" or "own" in timed
            assert all(one["step_over_named"] > 0 for one in timed.values())
            assert 0 <= row["routing"][kind]["right"] <= 100
        assert 0 <= row["routing"]["embeddings"]["right"] <= 100
        assert row["routing"]["document of 24"]["passages"] > 0
    assert figures["room"]["experts"] == 5
    assert figures["room"]["loads"] > 0
    assert all(figures["room"][how]["room_over_all"] > 0 for how in ("even", "zipf"))
