"""A client's schema or grammar either constrains the text or is refused in one sentence: it never
ends the process, fails later or takes long.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_model

from deepseek.engine import grammar_trial
from deepseek.engine.request import Grammar, GrammarCompilerError
from deepseek.engine.vocabulary import Vocabulary
from deepseek.errors import ConfigError

VOCABULARY = Vocabulary(*tiny_model())

ENDLESS: dict[str, Any] = {
    "itself": {"$ref": "#"},
    "a definition": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "in turn": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "by allOf": {"allOf": [{"$ref": "#"}]},
}


def nested(levels: int, key: str) -> dict[str, Any]:
    """Return a schema of nested objects, arrays or alternatives."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        inner: dict[str, Any] = {
            "properties": {"properties": {"a": schema}},
            "items": {"type": "array", "items": schema},
            "anyOf": {"anyOf": [schema]},
        }[key]
        schema = inner
    return schema


@pytest.mark.parametrize("name", ENDLESS)
def test_a_schema_that_refers_to_itself_without_end_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        VOCABULARY.matcher(Grammar("json_schema", json.dumps(ENDLESS[name])))


def test_a_schema_of_a_tree_is_used() -> None:
    tree = {"type": "object", "properties": {"below": {"type": "array", "items": {"$ref": "#"}}}}
    assert VOCABULARY.matcher(Grammar("json_schema", json.dumps(tree))).allowed().any()


@given(st.integers(1, 450), st.sampled_from(["properties", "items", "anyOf"]))
def test_any_depth_is_used_or_refused(levels: int, key: str) -> None:
    try:
        matcher = VOCABULARY.matcher(Grammar("json_schema", json.dumps(nested(levels, key))))
    except ConfigError as error:
        assert str(error).count("\n") == 0
    else:
        assert matcher.allowed().any()


def chain(definitions: int) -> str:
    """Return a schema with a chain of slightly nested definitions, each referring to another."""
    part: dict[str, Any] = {}
    for number in range(definitions):
        inner: dict[str, Any] = {"$ref": f"#/$defs/a{number + 1}"}
        for _ in range(40):
            inner = {"items": inner}
        part[f"a{number}"] = inner
    return json.dumps({"$defs": {**part, f"a{definitions}": {}}, "$ref": "#/$defs/a0"})


COSTLY = {
    "a chain that overflows the stack": Grammar("json_schema", chain(100)),
    "a minute of compiling": Grammar("json_schema", '{"type": "integer", "multipleOf": 999983}'),
    "a million letters without a choice": Grammar("regex", "(a{1000}){1000}"),
    "letters in a constant": Grammar("json_schema", json.dumps({"const": "a" * 60_000})),
    "settings that undo ours": Grammar(
        "lark", '%llguidance {"no_forcing": false}\nstart: /(a{300}){300}/'
    ),
    "alternatives": Grammar("regex", "|".join(f"a{number}" for number in range(2500))),
    "a long literal": Grammar("gbnf", f'root ::= "{"a" * 16_000}"'),
    "rules in a row": Grammar(
        "gbnf",
        "root ::= a0\n" + "".join(f'a{n} ::= "x" a{n + 1}\n' for n in range(900)) + "a900 ::= .",
    ),
    "ambiguity": Grammar("gbnf", 'root ::= root root | "a" | ""'),
    "nested repetitions": Grammar("gbnf", "root ::= x{2000}\nx ::= y{2000}\ny ::= [a-z]*"),
    "itself": Grammar("gbnf", "root ::= root"),
    "blanks in a repetition": Grammar(
        "gbnf", 'root ::= "a"{' + " " * 8000 + "," + " " * 8000 + "x"
    ),
    "parentheses": Grammar("gbnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
    "too long": Grammar("regex", "a" * 20_000),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_grammar_is_used_or_refused_soon(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial, "TRIAL_SECONDS", 1.0)
    started = time.perf_counter()
    try:
        matcher = VOCABULARY.matcher(COSTLY[name])
        for _ in range(3):
            allowed = matcher.allowed()
            matcher.take(int(allowed.nonzero()[0][-1]))
    except ConfigError as error:
        assert str(error).count("\n") == 0
        assert len(str(error)) < 400
    assert time.perf_counter() - started < 10


@pytest.fixture
def trial() -> Iterator[grammar_trial.Trial]:
    trial = grammar_trial.Trial()
    yield trial
    trial.stop()


def test_a_process_that_does_not_start_is_tried_again(
    trial: grammar_trial.Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(grammar_trial, "START_SECONDS", 0.0)
        with pytest.raises(GrammarCompilerError, match="does not start"):
            trial.complaint("start: /a/")
    assert trial.complaint("start: /a/") == ""


def test_the_process_finds_the_packages_of_this_one_and_its_failure_is_quoted(
    trial: grammar_trial.Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llguidance.py").write_text("raise ImportError('built for another Python')\n")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(
            GrammarCompilerError, match=r"\(ImportError: built for another Python\)"
        ):
            trial.complaint("start: /a/")
    assert trial.complaint("start: /a/") == ""


def test_the_process_that_tries_grammars_starts_again_after_a_crash(
    trial: grammar_trial.Trial,
) -> None:
    crash = f"start: %json {chain(300)}"
    assert trial.complaint(crash) == "it is too complex"
    assert trial.complaint("start: /a/") == ""


def test_a_grammar_for_which_time_was_up_is_tried_again(
    trial: grammar_trial.Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> str:
        raise TimeoutError

    assert trial.complaint("start: /b/") == ""
    with monkeypatch.context() as patch:
        patch.setattr(grammar_trial, "_line", never)  # the answer never arrives in time
        assert trial.complaint("start: /a/") == "it is too complex"
    assert trial.complaint("start: /a/") == ""
