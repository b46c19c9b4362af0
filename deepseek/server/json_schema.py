"""Prepare clients' JSON schemas before they are compiled to a grammar."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote

OTHERS = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
"""Keywords with which a schema states which other keys an object may have."""

SHAPES = {
    *("properties", "$ref", "allOf", "anyOf", "oneOf"),
    *("not", "if", "then", "else", "dependentSchemas"),
}
"""Keywords that describe the object itself, not its values. If there are several, each describes
only a part of the object, so none of them may be closed.
"""

PARTS = SHAPES - {"properties"}
"""Those of them that hold further schemas of the same object."""

CONDITIONS = {"not", "if", "dependentSchemas"}
"""Keywords whose schemas an object need not match; closing them would change the meaning."""

NAMED = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
"""Keywords whose value maps names to schemas."""

VALUES = ("const", "enum", "default", "examples")
"""Keywords whose value is not a schema."""


def closed(schema: Any) -> Any:
    """Return a JSON schema in which objects have only the keys that it names.

    JSON Schema allows other keys unless `additionalProperties` forbids them, so a model may invent
    keys until the token limit. Not closed are objects without `properties`, objects that state
    which other keys they may have or that require one which they do not name, and objects that are
    described in several places, such as the parts of `allOf`, or a definition that an object with
    its own `properties` refers to.

    The time is proportional to the schema's size, whatever the references.

    Args:
        schema: the schema, a JSON value.
    """
    result = json.loads(json.dumps(schema))  # a copy without shared parts
    schemas = list(_every(result))
    opened = _opened(result, schemas)
    for each in schemas:
        if id(each) not in opened and not OTHERS & each.keys() and _names_all(each):
            each["additionalProperties"] = False
    return result


def _names_all(schema: dict[str, Any]) -> bool:
    """Return whether a schema has `properties`, among them all keys that it requires."""
    named, required = schema.get("properties"), schema.get("required", [])
    if not (isinstance(named, dict) and isinstance(required, list)):
        return False
    return all(isinstance(key, str) and key in named for key in required)


def _every(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield a schema and all schemas in it."""
    pending = list(_listed(schema))
    while pending:
        each = pending.pop()
        yield each
        pending += _inner(each, each)


def _inner(schema: dict[str, Any], keywords: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the schemas directly inside a schema, under some of its keywords."""
    for keyword in keywords:
        value = schema[keyword]
        if keyword in NAMED and isinstance(value, dict):
            yield from _listed(list(value.values()))
        elif keyword not in VALUES:
            yield from _listed(value)


def _listed(value: Any) -> Iterator[dict[str, Any]]:
    """Yield a value that is a schema, or those in a list."""
    if isinstance(value, dict):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _listed(inner)


def _opened(root: Any, schemas: Iterable[dict[str, Any]]) -> set[int]:
    """Return the `id` of each schema that is not the only one for its object.

    The search starts at schemas with several of `SHAPES`, at those with keys of their own that they
    require beside one, and at those under `CONDITIONS`. Their parts, and the targets of their
    references, describe the same object too.

    Args:
        root: the whole schema, to which references lead.
        schemas: all schemas in it.
    """
    known: set[int] = set()
    pending: list[dict[str, Any]] = []
    for each in schemas:
        known.add(id(each))
        parts = each.get("allOf")
        shapes = len(SHAPES & each.keys()) + bool(each.get("required") and PARTS & each.keys())
        if shapes > 1 or (isinstance(parts, list) and len(parts) > 1):
            pending.append(each)
        pending += _inner(each, CONDITIONS & each.keys())
    opened: set[int] = set()
    while pending:
        each = pending.pop()
        if id(each) in opened:
            continue
        opened.add(id(each))
        pending += _inner(each, PARTS & each.keys())
        target = _referenced(root, each.get("$ref"))
        pending += [target] if id(target) in known else []
    return opened


def _referenced(root: Any, reference: Any) -> Any:
    """Return the part of a schema to which a reference leads, None if it leads nowhere.

    Args:
        root: the schema.
        reference: a JSON pointer after "#", such as "#/$defs/name".
    """
    if not isinstance(reference, str) or not re.match("#(/|$)", reference):
        return None
    part = root
    for name in unquote(reference).split("/")[1:]:
        try:
            part = part[int(name) if isinstance(part, list) else unescaped(name)]
        except (LookupError, TypeError, ValueError):
            return None
    return part


def unescaped(name: str) -> str:
    """Return a name that stands in a JSON pointer."""
    return name.replace("~1", "/").replace("~0", "~")


def moved(schema: Any, root: str) -> Any:
    """Return a JSON schema with its references rewritten for embedding at the pointer `root`.

    Its own `$id` is left out: pointers would lead into the embedded schema alone. Within it, a
    schema with an `$id` stays as it is, since its pointers start at itself.
    """
    if isinstance(schema, dict):
        schema = {name: part for name, part in schema.items() if not _is_id(name, part)}
    return _moved(schema, root)


def _moved(schema: Any, root: str) -> Any:
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, dict) or any(_is_id(*item) for item in schema.items()):
        return schema
    return {
        name: root + part[1:]
        if name == "$ref" and isinstance(part, str) and part.startswith("#")
        else _moved(part, root)
        for name, part in schema.items()
    }


def _is_id(name: str, part: Any) -> bool:
    """Return whether a member of a schema is its `$id`, and not a property of that name."""
    return name == "$id" and isinstance(part, str)
