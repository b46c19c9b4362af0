"""JSON schemas are closed (no additional properties) unless they say otherwise."""

import json
import sys
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import Live

from deepseek.server.json_schema import CONDITIONS, NAMED, OTHERS, SHAPES, VALUES, closed, moved

NAMES = ["a", "properties", "$defs", "const"]
SCHEMAS = st.recursive(
    st.sampled_from([{}, {"type": "string"}, {"type": "object"}, {"const": {"properties": {}}}]),
    lambda inner: st.one_of(
        st.builds(
            lambda properties: {"type": "object", "properties": properties},
            st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
        ),
        st.builds(lambda items: {"type": "array", "items": items}, inner),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(lambda part: {"type": "object", "additionalProperties": part}, inner),
    ),
    max_leaves=8,
)


def objects(schema: Any) -> list[dict[str, Any]]:
    """Return the subschemas that name properties."""
    if not isinstance(schema, dict):
        return []
    own = [schema] if "properties" in schema else []
    inner = [
        *schema.get("properties", {}).values(),
        *schema.get("anyOf", ()),
        schema.get("items"),
        schema.get("additionalProperties"),
    ]
    return own + [found for part in inner for found in objects(part)]


@given(schema=SCHEMAS)
def test_every_named_object_is_closed_and_nothing_else_changes(schema: dict[str, Any]) -> None:
    result = closed(schema)
    assert all(found["additionalProperties"] is False for found in objects(result))
    for found in objects(result):
        del found["additionalProperties"]
    assert result == schema
    assert closed(closed(schema)) == closed(schema)


@pytest.mark.parametrize(
    ("schema", "value", "fits"),
    [
        ({"properties": {"a": {}}}, {"a": 1, "b": 2}, False),
        ({"properties": {"a": {}}, "additionalProperties": True}, {"a": 1, "b": 2}, True),
        ({"type": "object"}, {"b": 2}, True),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, {"a": 1, "b": 2}, True),
        ({"$defs": {"x": {"properties": {"a": {}}}}, "$ref": "#/$defs/x"}, {"a": 1, "b": 2}, False),
        ({"allOf": [{"properties": {"a": {}}}]}, {"a": 1, "b": 2}, False),
        ({"anyOf": [{"properties": {"a": {}}}, {"type": "null"}]}, {"a": 1, "b": 2}, False),
    ],
    ids=["closed", "opened", "free", "combined", "referenced", "one part", "union"],
)
def test_what_fits(schema: dict[str, Any], value: Any, fits: bool) -> None:
    assert jsonschema.Draft202012Validator(closed(schema)).is_valid(value) is fits


A, B = {"properties": {"a": {}}}, {"properties": {"b": {}}, "required": ["b"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"B": B}, "allOf": [{"$ref": "#/$defs/B"}, A]},
        {**A, "anyOf": [B, {"required": ["c"]}]},
        {**A, "oneOf": [B]},
        {"$defs": {"B": B}, **A, "$ref": "#/$defs/B"},
        {"$defs": {"B": B, "C": {"$ref": "#/$defs/B"}}, **A, "$ref": "#/$defs/C"},
        {"$defs": {"a/b": B}, **A, "$ref": "#/$defs/a~1b"},
        {"$defs": {"a b": B}, **A, "$ref": "#/$defs/a%20b"},
        {**A, "required": ["a", "b"]},
        {"$defs": {"A": A}, "$ref": "#/$defs/A", "required": ["b"]},
        {"allOf": [A], "required": ["b"]},
        {**A, "if": {"properties": {"a": {"const": 1}}}, "then": B},
        {**A, "dependentSchemas": {"a": B}},
        {"not": {"properties": {"a": {"const": 2}}}},
    ],
    ids=[
        *("allOf", "anyOf", "oneOf", "$ref", "chain", "escaped", "percent"),
        *("unnamed", "required of $ref", "required of allOf", "then", "dependent", "not"),
    ],
)
def test_what_is_described_in_several_places_stays_satisfiable(schema: dict[str, Any]) -> None:
    value = {"a": 1, "b": 2}
    assert jsonschema.Draft202012Validator(schema).is_valid(value)
    assert jsonschema.Draft202012Validator(closed(schema)).is_valid(value)
    inner = {"type": "object", "properties": {"item": {**A, "type": "object"}}}
    within = closed({**schema, "items": inner})["items"]["properties"]["item"]
    assert within["additionalProperties"] is False, "what is inside is closed as ever"


def test_a_format_without_the_keyword_is_closed(server: Live) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    with server.client() as client:
        reply = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "the value"}],
            max_tokens=300,
            seed=1,
            frequency_penalty=1,
            response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        )
    assert reply.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(reply.choices[0].message.content or ""), closed(schema))


NESTED = {"$id": "https://example.com/b", "$defs": {"C": {"const": 3}}, "$ref": "#/$defs/C"}


def test_an_embedded_schema_with_an_id_means_what_it_meant() -> None:
    schema = {
        "$id": "https://example.com/a",
        "properties": {"$id": {"$ref": "#/definitions/B"}, "c": NESTED},
        "definitions": {"B": {"const": 2}},
    }
    embedding = {"$ref": "#/$defs/f", "$defs": {"f": moved(schema, "#/$defs/f")}}
    for value in ({"$id": 2}, {"$id": 3}, {"c": 3}, {"c": 2}):
        fits = jsonschema.Draft202012Validator(schema).is_valid(value)
        assert jsonschema.Draft202012Validator(embedding).is_valid(value) is fits


REFERENCES = ["#", "#/$defs/a", "#/$defs/b~1c", "#/properties/a", "#/allOf/0", "#/$defs/a/not", "x"]
KEYWORDS = ["properties", "$defs", "dependentSchemas", "patternProperties"]
ENTANGLED = st.recursive(
    st.builds(lambda target: {"$ref": target}, st.sampled_from(REFERENCES))
    | st.just({"properties": {"a": {}}}),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "$ref": st.sampled_from(REFERENCES),
            "not": inner,
            "if": inner,
            "then": inner,
            "items": inner,
            "const": inner,
            "additionalProperties": st.booleans() | inner,
            **{key: st.dictionaries(st.sampled_from(["a", "b/c"]), inner) for key in KEYWORDS},
            **{key: st.lists(inner, max_size=2) for key in ("allOf", "anyOf", "prefixItems")},
        },
    ),
    max_leaves=12,
)


def closed_by_repetition(schema: Any) -> Any:
    """Return the result of `closed`, by repeated walks through the schema until no reference is
    new.
    """
    opened: set[str] = set()
    while True:
        known = set(opened)
        result = walked(schema, "#", False, opened)
        if opened == known:
            return result


def walked(schema: Any, pointer: str, is_part: bool, opened: set[str]) -> Any:
    if isinstance(schema, list):
        return [
            walked(inner, f"{pointer}/{place}", is_part, opened)
            for place, inner in enumerate(schema)
        ]
    if not isinstance(schema, dict):
        return schema
    several = len(SHAPES & schema.keys()) > 1 or len(schema.get("allOf", ())) > 1
    has_parts = several or is_part or pointer in opened
    if has_parts and "$ref" in schema:
        opened.add(schema["$ref"])
    changed: dict[str, Any] = {}
    for name, value in schema.items():
        below = f"{pointer}/{name}"
        inner_is_part = name in CONDITIONS or (name in SHAPES - {"properties"} and has_parts)
        if name in VALUES:
            changed[name] = value
        elif name in NAMED:
            changed[name] = {
                key: walked(inner, f"{below}/{key.replace('/', '~1')}", inner_is_part, opened)
                for key, inner in value.items()
            }
        else:
            changed[name] = walked(value, below, inner_is_part, opened)
    if "properties" in schema and not has_parts and not OTHERS & schema.keys():
        changed["additionalProperties"] = False
    return changed


@given(schema=ENTANGLED)
def test_one_walk_finds_what_repeated_walks_find(schema: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert closed(schema) == closed_by_repetition(schema)
    assert json.dumps(schema) == before


def chain(length: int) -> dict[str, Any]:
    """Return a schema whose last definition refers to the one before it, and so on."""
    links = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(length)}
    definitions = dict(reversed({**links, f"d{length}": {}}.items()))
    return {"properties": {"a": {}}, "$ref": "#/$defs/d0", "$defs": definitions}


def calls_of_closed(schema: dict[str, Any]) -> int:
    """Return the number of function calls needed to close a schema."""
    calls = 0

    def count(_frame: Any, event: str, _value: Any) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        closed(schema)
    finally:
        sys.setprofile(before)
    return calls


def test_a_chain_of_references_takes_time_in_proportion_to_its_length() -> None:
    """Regression: 1,600 definitions took seven seconds, during which no other prompt was built."""
    assert calls_of_closed(chain(400)) < 2.5 * calls_of_closed(chain(200))
