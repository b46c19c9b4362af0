"""A benchmark reuses kept results only for the same settings and texts."""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from deepseek.checkpoint.store import read_object
from deepseek.data.preferences.database import PreferenceDatabase
from deepseek.data.preferences.preference import Preference
from deepseek.errors import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def benchmark(name: str) -> ModuleType:
    return import_module(name)


def pair(*turns: str, chosen: str = "yes") -> Preference:
    roles = ("user", "assistant")
    prompt = tuple({"role": roles[place % 2], "content": text} for place, text in enumerate(turns))
    return Preference(prompt, chosen, "no")


def test_figures_name_every_commit_that_parts_of_them_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = benchmark("results")
    for commit, earlier in (("1111111", None), ("2222222", ["1111111"]), ("2222222", ["1111111"])):
        monkeypatch.setattr(results, "COMMIT", commit)
        monkeypatch.setattr(results, "_resumed", set())
        results.resumed(tmp_path / "work")
        results.write(tmp_path / "result.json", {"gain": 1})
        written = read_object(tmp_path / "result.json")
        assert (written["commit"], written.get("earlier_commits")) == (commit, earlier)


def test_part_of_the_pairs_does_not_pass_for_all(tmp_path: Path) -> None:
    path = tmp_path / "pairs.db"
    with pytest.raises(KeyboardInterrupt), benchmark("rlpo").new_database(path) as store:
        store.add_all([pair("a question")])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with benchmark("rlpo").new_database(path) as store:
        store.add_all([pair("a question")])
    database = PreferenceDatabase(path)
    assert database.statistics().pairs == 1
    database.close()


def test_a_conversation_stands_on_one_side_of_the_split() -> None:
    is_final = benchmark("human_prefs").is_final
    openings = [f"question {number}" for number in range(40)]
    sides = [is_final(pair(opening)) for opening in openings]
    longer = [is_final(pair(opening, "an answer", "and then?")) for opening in openings]
    assert sides == longer
    assert set(sides) == {False, True}


def test_other_pairs_have_another_digest() -> None:
    digest = benchmark("human_prefs").digest
    assert digest([pair("a")]) == digest([pair("a")])
    assert digest([pair("a")]) != digest([pair("a", chosen="perhaps")])


def test_kept_figures_are_those_of_the_same_settings(tmp_path: Path) -> None:
    kept = benchmark("kept").kept
    path = tmp_path / "figures" / "base.json"
    assert kept(path, {"tokens": 1}, lambda: {"exact": 0.5}) == {"exact": 0.5}
    assert kept(path, {"tokens": 1}, lambda: {"exact": 0.1}) == {"exact": 0.5}
    assert kept(path, {"tokens": 2}, lambda: {"exact": 0.1}) == {"exact": 0.1}
    assert [file.name for file in path.parent.iterdir()] == ["base.json"]


def test_stages_of_another_shape_are_refused(tmp_path: Path) -> None:
    work = benchmark("scale").Work
    work(tmp_path, {"shape": "1.2b"})
    assert work(tmp_path, {"shape": "1.2b"}).folder == tmp_path
    with pytest.raises(ConfigError, match="figures of other settings"):
        work(tmp_path, {"shape": "8b"})


def test_outcomes_of_another_budget_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark("lora_curve")
    folders = []

    def adapt(*_: object, out: Path, **__: object) -> None:
        folders.append(out.parent)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.deepseek, "adapt", adapt)
    for tokens in (1000, 2000):
        curve = object.__new__(module.Curve)
        curve.base = "/models/base"
        curve.options = argparse.Namespace(work=tmp_path, tokens=tokens, epochs=1)
        with pytest.raises(KeyboardInterrupt):
            curve.trained(Path("text"), module.Way("full"), 1e-3, 1)
    assert len(set(folders)) == 2
    assert all(folder.is_relative_to(tmp_path) for folder in folders)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["{one}", "{two}"], "rename one of two alike"),
        (["{one}", "--changes", "2 passes"], "--changes needs 'defaults'"),
    ],
)
def test_sources_that_would_share_outcomes_are_refused(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {name: tmp_path / name / "texts" for name in ("one", "two")}
    for place in places.values():
        place.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["defaults.py", *(word.format(**places) for word in words)])
    with pytest.raises(SystemExit, match=r"^2$"):
        benchmark("defaults").main()
    assert complaint in capsys.readouterr().err
