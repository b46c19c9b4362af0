"""A JSON schema from a client either constrains the text or is refused in one sentence: nothing
fails later, and nothing takes long.
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_model

from deepseek.engine.request import Grammar
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
