"""`deepseek.claims`: figures from result files, and which claims are reached or stale (declaration,
paths, history, evaluation).
"""

import json
import shutil
from pathlib import Path
from statistics import median
from typing import Any, Literal

import pytest
import yaml
from claim_files import DECLARATION, commit_all, git, make_checkout, write_result
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deepseek.claims.declaration import CHECKOUT, Claim, Figure, Goal, Side, read_declaration
from deepseek.claims.evaluation import (
    ClaimTable,
    MeasuredFigure,
    Provenance,
    claim_table,
    compute,
    meets,
    state_of,
)
from deepseek.claims.history import History
from deepseek.claims.paths import numbers
from deepseek.errors import ConfigError

ARTICLE = [
    "params",
    "speed",
    "latency",
    "dpe",
    "lsh",
    "memory",
    "curriculum",
    "schedule",
    "last3",
    "lora",
    "rlpo",
    "prefs",
    "code-routing",
    "int8",
    "compiled",
    "zero3",
    "hotplug",
    "compose",
]
ADDED = ["mixtures", "scale", "against", "many", "fresh", "infilling", "settings", "human-prefs"]
"""Claims of this project, in addition to the article's."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "clone")


def by_name(table: ClaimTable) -> dict[str, Any]:
    return {row.name: row for row in table.claims}


def figures_of(claim: Claim) -> list[Figure]:
    """Return the declared figure behind each figure of an evaluated claim."""
    return [figure for figure in claim.figures for _ in figure.results or ("",)]


def test_every_claim_of_the_design_is_declared() -> None:
    assert list(read_declaration(CHECKOUT).claims) == ARTICLE + ADDED


def test_the_table_has_them_all_and_says_why_where_one_is_not_reached() -> None:
    rows = by_name(claim_table(CHECKOUT))
    assert list(rows) == ARTICLE + ADDED
    assert [name for name, row in rows.items() if row.state != "reached" and not row.why] == []
    declared = read_declaration(CHECKOUT).claims
    unexplained = [
        (name, figure.what)
        for name, row in rows.items()
        for figure, asked in zip(row.figures, figures_of(declared[name]), strict=True)
        if not figure.text and not asked.unmeasured
    ]
    assert unexplained == []


def test_what_the_declaration_names_is_there() -> None:
    declared = read_declaration(CHECKOUT)
    figures = [figure for claim in declared.claims.values() for figure in claim.figures]
    names = {name for figure in figures for name in figure.results}
    assert names == set(declared.results), "a claim uses every declared result, and no other"
    paths = [path for one in declared.results.values() for path in one.measures + one.kept]
    paths += [f"docs/{claim.log}" for claim in declared.claims.values() if claim.log]
    paths += [
        f"benchmarks/results/{claim.picture}" for claim in declared.claims.values() if claim.picture
    ]
    for one in declared.results.values():
        paths += [words.split()[0] for words in (one.command, one.quick) if words]
    assert [path for path in paths if not (CHECKOUT / path).exists()] == []
    tests = [figure.test.split("::") for figure in figures if figure.test]
    assert [
        name for file, name in tests if f"def {name}(" not in (CHECKOUT / file).read_text()
    ] == []


def test_a_result_that_is_there_is_shown() -> None:
    """A declared figure has a result or a test, or is marked as unmeasured, never both."""
    figures = [f for claim in read_declaration(CHECKOUT).claims.values() for f in claim.figures]
    assert [f.what for f in figures if f.unmeasured and (f.results or f.test)] == []
    assert [f.what for f in figures if not (f.unmeasured or f.results or f.test)] == []


def test_a_figure_is_the_median_of_its_rounds_with_their_range(checkout: Path) -> None:
    figure = by_name(claim_table(checkout))["fast"].figures[0]
    assert (figure.value, figure.interval, figure.spread) == (3.0, [2.0, 3.0], "3 rounds")
    assert figure.text == "3.0x (2.0 to 3.0x)"
    assert (figure.ours, figure.rival, figure.theirs, figure.met) == ("6", "theirs", "2", True)


def test_a_claim_that_was_never_run_stays_in_the_table(checkout: Path) -> None:
    row = by_name(claim_table(checkout))["better"]
    assert (row.state, row.stale) == ("not run", False)
    assert [figure.unmeasured for figure in row.figures] == ["no result yet", "no benchmark"]
    assert [(figure.value, figure.text) for figure in row.figures] == [(None, "")] * 2


def test_a_bound_that_is_not_measured_keeps_a_claim_from_being_reached(checkout: Path) -> None:
    write_result(checkout, "gain", "unknown", gain=0.7)
    assert by_name(claim_table(checkout))["better"].state == "partly"
    write_result(checkout, "gain", "unknown", gain=0.3)
    assert by_name(claim_table(checkout))["better"].state == "missed"


@pytest.mark.parametrize(
    ("met", "state"),
    [
        ([True, True], "reached"),
        ([True, False], "partly"),
        ([True, None], "partly"),
        ([False, None], "missed"),
    ],
)
def test_states(met: list[bool | None], state: str) -> None:
    figures = [
        MeasuredFigure(what="x", text="" if one is None else "1", goal=">= 1", met=one)
        for one in met
    ]
    assert state_of(figures) == state


@pytest.mark.parametrize(
    ("sign", "low", "met"),
    [(">", 0.5, True), (">", 0.0, False), (">", -0.5, False), (">=", -0.5, True)],
)
def test_being_better_needs_the_whole_interval(sign: Goal, low: float, met: bool) -> None:
    figure = Figure(what="x", ours="seeds/*", goal=(sign, 0))
    assert meets(figure, 1.0, [low, 2.0]) is met
    assert meets(figure, 1.0, []) is True
    assert meets(Figure(what="x"), 1.0, [low, 2.0]) is None


@pytest.mark.parametrize("sign", [">", "<"])
def test_being_better_needs_an_interval(sign: Goal) -> None:
    with pytest.raises(ValidationError, match="has no interval"):
        Figure(what="x", ours="gain", goal=(sign, 0))
    Figure(what="x", ours="gain", interval=("low", "high"), goal=(sign, 0))


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_where_each_must_hold_the_worst_is_shown(values: list[float]) -> None:
    names: tuple[Literal["least", "median", "largest"], ...] = ("least", "median", "largest")
    source = Provenance(result="x", machine="", commit="", date="", command="", changed=None)
    figures = {
        name: compute(Figure(what="x", ours="kept/*", statistic=name), {"kept": values}, source)
        for name in names
    }
    assert figures["least"].value == min(values)
    assert figures["largest"].value == max(values)
    assert figures["median"].value == median(values)
    assert len({str(figure.interval) for figure in figures.values()}) == 1


def test_a_result_is_stale_once_its_code_has_changed_since_a_part_of_it(checkout: Path) -> None:
    earlier = git(checkout, "rev-parse", "--short", "HEAD")
    (checkout / "package" / "engine" / "step.py").write_text("new\n")
    head = commit_all(checkout)
    path = checkout / "benchmarks" / "results" / "speed.json"
    figures = json.loads(path.read_text()) | {"commit": head}
    for commits, changed in (
        ([], []),
        ([earlier], ["package/engine"]),
        (["unknown"], None),
        (["unknown", earlier], ["package/engine"]),
    ):
        path.write_text(json.dumps(figures | {"earlier_commits": commits}))
        source = by_name(claim_table(checkout))["fast"].figures[0].source
        assert source.changed == changed


def test_what_an_earlier_run_kept_is_judged_by_what_decides_it(checkout: Path) -> None:
    earlier = git(checkout, "rev-parse", "--short", "HEAD")
    (checkout / "package" / "engine" / "step.py").write_text("new\n")
    head = commit_all(checkout)
    path = checkout / "benchmarks" / "results" / "speed.json"
    figures = json.loads(path.read_text()) | {"commit": head, "earlier_commits": [earlier]}
    path.write_text(json.dumps(figures))
    declaration = checkout / "benchmarks" / "claims.yaml"
    text = declaration.read_text()
    speed = "  speed:\n"
    assert speed in text
    declaration.write_text(text.replace(speed, f"{speed}    kept: [package/train.py]\n"))
    assert by_name(claim_table(checkout))["fast"].figures[0].source.changed == []
    (checkout / "package" / "train.py").write_text("new\n")
    commit_all(checkout)
    source = by_name(claim_table(checkout))["fast"].figures[0].source
    assert source.changed == ["package/train.py"]


def test_a_result_is_stale_once_its_code_has_changed(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "--short", "HEAD")
    assert by_name(claim_table(checkout))["fast"].stale is False
    (checkout / "package" / "train.py").write_text("new\n")
    commit_all(checkout)
    assert by_name(claim_table(checkout))["fast"].stale is False, "it measures other code"
    (checkout / "package" / "engine" / "step.py").write_text("new\n")
    head = commit_all(checkout)
    table = claim_table(checkout)
    figures = by_name(table)["fast"].figures
    assert table.commit == head
    assert by_name(table)["fast"].stale is True
    assert [figure.source.changed for figure in figures] == [["package/engine"]] * 2
    (checkout / "package" / "engine" / "step.py").write_text("old\n")
    commit_all(checkout)
    assert History(checkout).changed(commit, ["package/engine"]) == [], "content counts"


@pytest.mark.parametrize(
    ("now", "changed"),
    [
        (
            '"""Doubles."""\n\n\ndef double(x):  # of ints\n    """Twice x."""\n    return 2 * x\n',
            False,
        ),
        ("def double(x):\n    return (\n        2 * x\n    )\n", False),
        ("def double(x):\n    return x * 2\n", True),
        ("def double(x):\n    return '2 * x'\n", True),
        ("def double(x):\n", True),
    ],
)
def test_comments_docstrings_and_layout_are_no_code(
    checkout: Path, now: str, changed: bool
) -> None:
    step = checkout / "package" / "engine" / "step.py"
    step.write_text("def double(x):\n    return 2 * x\n")
    commit = commit_all(checkout)
    step.write_text(now)
    commit_all(checkout)
    paths = ["package/engine", "package/engine/step.py"]
    assert History(checkout).changed(commit, paths) == (paths if changed else [])


def test_code_that_is_no_utf_8_is_compared(checkout: Path) -> None:
    step = checkout / "package" / "engine" / "step.py"
    step.write_bytes(b"# -*- coding: latin-1 -*-\nname = 'caf\xe9'\n")
    commit = commit_all(checkout)
    step.write_bytes(b"# -*- coding: latin-1 -*-\nname = 'caf\xe8'\n")
    commit_all(checkout)
    assert History(checkout).changed(commit, ["package/engine"]) == ["package/engine"]


def test_a_new_or_removed_file_changes_its_folder(checkout: Path) -> None:
    commit = commit_all(checkout)
    (checkout / "package" / "engine" / "empty.py").write_text("")
    head = commit_all(checkout)
    assert History(checkout).changed(commit, ["package/engine"]) == ["package/engine"]
    (checkout / "package" / "engine" / "empty.py").unlink()
    commit_all(checkout)
    assert History(checkout).changed(head, ["package/engine"]) == ["package/engine"]


def test_what_was_measured_with_uncommitted_changes_is_never_fresh(checkout: Path) -> None:
    commit = commit_all(checkout)
    assert History(checkout).changed(f"{commit}-dirty", ["package/engine"]) is None
    (checkout / "package" / "engine" / "step.py").write_text("new\n")
    commit_all(checkout)
    assert History(checkout).changed(f"{commit}-dirty", ["package/engine"]) == ["package/engine"]


@pytest.mark.parametrize("commit", ["unknown", "0123456", "", "--help", "HEAD\nHEAD"])
def test_of_an_unknown_commit_nothing_is_known(checkout: Path, commit: str) -> None:
    assert History(checkout).changed(commit, ["package/engine"]) is None


def test_code_that_was_not_there_is_a_change(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    git(checkout, "mv", "package/engine", "package/motor")
    commit_all(checkout)
    paths = ["package/engine", "package/motor", "package/train.py"]
    assert History(checkout).changed(commit, paths) == ["package/engine", "package/motor"]


def test_outside_a_repository_staleness_is_unknown(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    table = claim_table(checkout)
    assert table.commit is None
    assert by_name(table)["fast"].stale is None
    assert by_name(table)["fast"].state == "reached"


def test_without_git_staleness_is_unknown(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert by_name(claim_table(checkout))["fast"].stale is None


def test_a_misspelt_key_is_refused(checkout: Path) -> None:
    spoilt = json.loads(json.dumps(DECLARATION))
    spoilt["claims"]["fast"]["figures"][0]["gaol"] = [">=", 1]
    (checkout / "benchmarks" / "claims.yaml").write_text(yaml.safe_dump(spoilt))
    with pytest.raises(ConfigError, match="gaol"):
        claim_table(checkout)


def test_a_result_without_its_rival_leaves_the_other_claims(checkout: Path) -> None:
    before = by_name(claim_table(checkout))
    write_result(checkout, "speed", "unknown", rounds={"ours": [1.0, 2.0, 3.0]})
    rows = by_name(claim_table(checkout))
    (lacking,) = [figure for figure in rows["fast"].figures if not figure.text]
    assert "results/speed.json has no" in lacking.unmeasured and "theirs" in lacking.unmeasured
    assert rows["fast"].state != "reached"
    others = rows.keys() - {"fast"}
    assert {name: rows[name] for name in others} == {name: before[name] for name in others}


def test_a_figure_that_cannot_be_computed_is_named(checkout: Path) -> None:
    write_result(checkout, "speed", "unknown", rounds={"ours": [0.0], "theirs": [0.0]})
    with pytest.raises(ConfigError, match=r"results/speed\.json has .*measure it again"):
        claim_table(checkout)


def test_without_a_checkout_it_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clone"):
        claim_table(tmp_path)


RECORD = {"a": {"x": 1.0, "y": 3.0}, "runs": [{"saved": 0.5}, {"saved": -0.5}], "yes": True}


@pytest.mark.parametrize(
    ("side", "found"),
    [
        ("a/x", [1.0]),
        ("a/*", [1.0, 3.0]),
        ("runs/*/saved", [0.5, -0.5]),
        ("runs/*/*", [0.5, -0.5]),
        ("runs/1/saved", [-0.5]),
        ("yes", [1.0]),
        (("a/y", "minus", "a/x"), [2.0]),
        (("a/y", "over", "a/x"), [3.0]),
        (("runs/*/saved", "minus", "a/x"), [-0.5, -1.5]),
        (("nothing", "or", "a/x"), [1.0]),
    ],
)
def test_paths(side: Side, found: list[float]) -> None:
    assert numbers(RECORD, side) == found


@pytest.mark.parametrize(
    "side", ["b", "a", "a/x/*", "a/x/z", "runs/2/saved", ("b", "minus", "a/x")]
)
def test_a_path_that_leads_nowhere_is_an_error(side: Side) -> None:
    with pytest.raises(KeyError):
        numbers(RECORD, side)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.floats(-1e6, 1e6))
def test_a_difference_is_taken_in_pairs(values: list[float], other: float) -> None:
    record = {"ours": values, "theirs": values, "one": other}
    assert numbers(record, ("ours/*", "minus", "theirs/*")) == [0.0] * len(values)
    assert numbers(record, ("ours/*", "minus", "one")) == [value - other for value in values]
