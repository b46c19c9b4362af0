"""Structured mutation: start from valid files and values, and change bytes, lengths, nodes, words."""

import copy
import json
import math
import re
import struct
from typing import Any

from hypothesis import strategies as st

LENGTHS = (0, 1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
"""Values at which lengths, counts and offsets overflow."""

LEAVES: list[Any] = [None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308]
LEAVES += [
    math.nan,
    math.inf,
    -math.inf,
    "",
    "a",
    "\ud800",
    "a\0b",
    "\x1b[2J",
    "x" * 3000,
    "../../x",
]
LEAVES += [[], {}, [[]], [None], {"": None}, {"a": {"a": {"a": 1}}}]

DEEP = 3000
"""Levels of nesting at which recursive readers without a limit fail."""


@st.composite
def mutated_bytes(draw: st.DrawFn, *seeds: bytes, most: int = 4) -> bytes:
    """Return one of the seeds after up to `most` edits: bits, lengths, cuts, copies, splices."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, most))):
        # Headers come first in most formats, so half of the edits go there.
        reach = draw(st.sampled_from([64, 512, len(data)]))
        place = draw(st.integers(0, max(0, min(reach, len(data)) - 1)))
        kind = draw(st.sampled_from(["bit", "byte", "u32", "u64", "cut", "drop", "copy", "splice"]))
        if kind == "bit" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[place] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, ord("{"), ord('"')]))
        elif kind in ("u32", "u64"):
            value = draw(st.sampled_from(LENGTHS))
            word = struct.pack("<I", value % 2**32) if kind == "u32" else struct.pack("<Q", value)
            data[place : place + len(word)] = word
        elif kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place : place + draw(st.integers(1, 32))]
        elif kind == "copy":
            part = data[place : place + draw(st.integers(1, 64))]
            data[place:place] = part * draw(st.sampled_from([1, 2, 100]))
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            data[place:] = other[draw(st.integers(0, len(other))) :]
    return bytes(data)


@st.composite
def mutated_facts(draw: st.DrawFn, *seeds: bytes, most: int = 3) -> bytes:
    """Return a GGUF file after up to `most` edits of numbers in its metadata."""
    data = bytearray(draw(st.sampled_from(seeds)))
    # End of a key, type of its value (4: uint32, 6: float32); the value follows.
    numbers = [found.end() for found in re.finditer(rb"[a-z_]\.[a-z_.]+[\x04\x06]\0\0\0", data)]
    for place in draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=most, unique=True)):
        if draw(st.booleans()):
            word = struct.pack("<I", draw(st.sampled_from(LENGTHS)) % 2**32)
        else:
            word = struct.pack(
                "<f", draw(st.sampled_from([0.0, -1.0, 1e-30, 1e30, math.inf, math.nan]))
            )
        data[place : place + 4] = word
        data[place - 4] = draw(st.sampled_from([data[place - 4], 4, 5, 6]))
    return bytes(data)


@st.composite
def mutated_value(draw: st.DrawFn, *seeds: Any, most: int = 3) -> Any:
    """Return a copy of one of the seeds after up to `most` edits of nodes: replaced by a leaf or by
    another node, removed, repeated, renamed.
    """
    value = json.loads(json.dumps(draw(st.sampled_from(seeds))))
    for _ in range(draw(st.integers(0, most))):
        nodes = list(places(value))
        if not nodes:
            return draw(leaves())
        parent, key = draw(st.sampled_from(nodes))
        kind = draw(st.sampled_from(["leaf", "leaf", "node", "remove", "add", "rename", "wrap"]))
        if kind == "leaf":
            parent[key] = draw(leaves())
        elif kind == "node":
            other, name = draw(st.sampled_from(nodes))
            parent[key] = json.loads(json.dumps(other[name]))
        elif kind == "remove":
            del parent[key]
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", "", "type", "$ref", "\x1b[0m"]))] = draw(leaves())
        elif kind == "add":
            parent.insert(key, draw(leaves()))
        elif kind == "rename" and isinstance(parent, dict):
            parent[key + draw(st.sampled_from(["s", "_", "\0"]))] = parent.pop(key)
        elif kind == "wrap":
            parent[key] = [parent[key]]
    return value


@st.composite
def leaves(draw: st.DrawFn) -> Any:
    """Return a copy of a leaf, since edits change values in place."""
    return copy.deepcopy(draw(st.sampled_from(LEAVES)))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every node below a JSON value as (its parent, its key)."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        parent = waiting.pop()
        keys = parent if isinstance(parent, dict) else range(len(parent))
        for key in list(keys) if isinstance(parent, dict | list) else ():
            found.append((parent, key))
            if isinstance(parent[key], dict | list):
                waiting.append(parent[key])
    return found


def deep(opening: str, closing: str) -> str:
    """Return text nested `DEEP` levels deep."""
    return opening * DEEP + closing * DEEP


@st.composite
def mutated_text(draw: st.DrawFn, *seeds: str, words: tuple[str, ...] = (), most: int = 4) -> str:
    """Return a seed after up to `most` edits: words inserted, parts removed or repeated."""
    text = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, most))):
        place = draw(st.integers(0, len(text)))
        kind = draw(st.sampled_from(["put", "put", "drop", "copy", "swap"]))
        if kind == "put":
            word = draw(st.sampled_from(words)) if words else draw(st.text(max_size=4))
            text = text[:place] + word + text[place:]
        elif kind == "drop":
            text = text[:place] + text[place + draw(st.integers(1, 12)) :]
        elif kind == "copy":
            length = draw(st.integers(1, 20))
            times = draw(st.sampled_from([2, 50]))
            text = text[:place] + text[place : place + length] * times + text[place + length :]
        elif kind == "swap":
            text = text[place:] + text[:place]
    return text
