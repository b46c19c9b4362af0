"""JSON schemas of clients, before a grammar is made of them."""

from typing import Any

OPEN = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
"""Keywords by which a schema says itself which other keys an object may have."""

SCHEMAS = ("properties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose value maps names to schemas."""

COMBINED = "allOf"
"""Each of its schemas describes a part of the object, so none can say that there is no more."""


def closed(schema: Any) -> Any:
    """Return a JSON schema in which objects have no keys beyond those that it names.

    JSON Schema allows any other key unless `additionalProperties` says no; a model then invents
    keys until the token limit. An object without `properties`, and one that says what else it may
    hold, stays as it is.

    Args:
        schema: the schema, or a part of one.
    """
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {
        name: {key: closed(part) for key, part in value.items()}
        if name in SCHEMAS and isinstance(value, dict)
        else value
        if name in ("const", "enum", "default", "examples", COMBINED)
        else closed(value)
        for name, value in schema.items()
    }
    if "properties" in schema and COMBINED not in schema and not OPEN & schema.keys():
        changed["additionalProperties"] = False
    return changed


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
