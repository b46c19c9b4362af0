"""JSON schemas of clients, before a grammar is made of them."""

from typing import Any

OTHERS = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
"""Keywords by which a schema says itself which other keys an object may have."""

SHAPES = {
    *("properties", "$ref", "allOf", "anyOf", "oneOf"),
    *("not", "if", "then", "else", "dependentSchemas"),
}
"""Keywords that describe the object itself, not what is in it. Where there are several, each of
them describes a part of the object, so none can say that there is no more.
"""

CONDITIONS = {"not", "if", "dependentSchemas"}
"""Keywords whose schemas an object need not fit; closed, they would mean something else."""

NAMED = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
"""Keywords whose value maps names to schemas."""

VALUES = ("const", "enum", "default", "examples")
"""Keywords whose value is no schema."""


def closed(schema: Any) -> Any:
    """Return a JSON schema in which objects have no keys beyond those that it names.

    JSON Schema allows any other key unless `additionalProperties` says no; a model then invents
    keys until the token limit. These stay as they are: an object without `properties`, one that
    says what else it may hold, and one that is described in several places, such as the parts of
    `allOf`, or a definition that an object with `properties` of its own refers to.

    Args:
        schema: the schema.
    """
    opened: set[str] = set()
    while True:
        known = set(opened)
        result = _closed(schema, "#", False, opened)
        if opened == known:
            return result


def _closed(schema: Any, pointer: str, is_part: bool, opened: set[str]) -> Any:
    """Return a closed schema, or a list of them.

    Args:
        schema: the schema, or part of one.
        pointer: where it stands, as a reference to it.
        is_part: whether other schemas describe the same object.
        opened: references to schemas that describe a part of an object; those found are added.
    """
    if isinstance(schema, list):
        return [
            _closed(inner, f"{pointer}/{place}", is_part, opened)
            for place, inner in enumerate(schema)
        ]
    if not isinstance(schema, dict):
        return schema
    every = schema.get("allOf")
    has_parts = len(SHAPES & schema.keys()) > 1 or (isinstance(every, list) and len(every) > 1)
    has_parts = has_parts or is_part or pointer in opened
    if has_parts and isinstance(schema.get("$ref"), str):
        opened.add(schema["$ref"])
    changed = {}
    for name, value in schema.items():
        below = f"{pointer}/{name}"
        inner_is_part = name in CONDITIONS or (name in SHAPES - {"properties"} and has_parts)
        if name in VALUES:
            changed[name] = value
        elif name in NAMED and isinstance(value, dict):
            changed[name] = {
                key: _closed(inner, f"{below}/{escaped(key)}", inner_is_part, opened)
                for key, inner in value.items()
            }
        else:
            changed[name] = _closed(value, below, inner_is_part, opened)
    if "properties" in schema and not has_parts and not OTHERS & schema.keys():
        changed["additionalProperties"] = False
    return changed


def escaped(name: str) -> str:
    """Return a name as it stands in a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def moved(schema: Any, root: str) -> Any:
    """Return a JSON schema with its references rewritten for embedding at the pointer `root`."""
    if isinstance(schema, list):
        return [moved(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: root + part[1:]
        if name == "$ref" and isinstance(part, str) and part.startswith("#")
        else moved(part, root)
        for name, part in schema.items()
    }
