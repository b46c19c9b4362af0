"""Encode replies as JSON, large ones in parts: the standard library's encoder holds the GIL until
it is done, so even in a separate thread it would stall the event loop.
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

PART = 1 << 10
"""Maximum number of values that are encoded at a time; they take about a millisecond."""

LINE_ENDS = re.compile("[\x85\u2028\u2029]")
"""Characters that JSON allows unescaped, but at which some clients split a stream into lines."""

_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def encoded(value: Any) -> bytes:
    """Return JSON in UTF-8; bytes of file names that are not UTF-8 become question marks."""
    return text_of(value).encode(errors="replace")


def text_of(value: Any) -> str:
    """Return JSON on one line."""
    return LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", _encoder.encode(value))


async def encoded_aside(make: Callable[[], Any]) -> bytes:
    """Return the JSON of what `make` returns; `make` and the encoding run in a thread, in parts.

    Args:
        make: returns a JSON value whose keys are texts.
    """
    return await asyncio.to_thread(lambda: "".join(parts(make())).encode(errors="replace"))


def is_large(value: Any) -> bool:
    """Return whether a JSON value has more than `PART` values in it."""
    pending = [value]
    count = 0
    while pending and count <= PART:
        inner = pending.pop()
        if isinstance(inner, dict):
            pending += inner.values()
        elif isinstance(inner, list):
            pending += inner
        count += 1
    return count > PART


def parts(value: Any) -> Iterator[str]:
    """Yield the JSON of a value in parts of at most `PART` numbers or texts.

    Args:
        value: a JSON value whose keys are texts.
    """
    if isinstance(value, dict) and (len(value) > PART or not _is_flat(value.values())):
        yield from _object(value)
    elif isinstance(value, list) and not _is_flat(value):
        yield from _array(value)
    elif isinstance(value, list) and len(value) > PART:
        yield "["
        for start in range(0, len(value), PART):
            yield ("," if start else "") + text_of(value[start : start + PART])[1:-1]
        yield "]"
    else:
        yield text_of(value)


def _is_flat(values: Any) -> bool:
    return not any(isinstance(value, dict | list) for value in values)


def _object(value: dict[str, Any]) -> Iterator[str]:
    yield "{"
    for place, (name, inner) in enumerate(value.items()):
        yield f"{',' if place else ''}{text_of(name)}:"
        yield from parts(inner)
    yield "}"


def _array(value: list[Any]) -> Iterator[str]:
    yield "["
    for place, inner in enumerate(value):
        if place:
            yield ","
        yield from parts(inner)
    yield "]"
