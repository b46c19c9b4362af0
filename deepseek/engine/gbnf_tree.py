"""Grammars as trees: the output of the GBNF reader, and the conversion of parts without references
to regular expressions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]
"""Code points, as first and last of each range."""

LAST_CHARACTER = 0x10FFFF


@dataclass(frozen=True)
class Chars:
    """One character of some ranges; `negated`: one that is in none of them."""

    ranges: Ranges
    negated: bool = False


@dataclass(frozen=True)
class Seq:
    """Parts one after the other; without any: the empty text."""

    parts: "tuple[Node, ...]"


@dataclass(frozen=True)
class Alt:
    """One of the parts."""

    parts: "tuple[Node, ...]"


@dataclass(frozen=True)
class Repeat:
    """A part at least `least` and at most `most` times; None: without a limit."""

    part: "Node"
    least: int
    most: int | None


@dataclass(frozen=True)
class Call:
    """A reference to a rule."""

    name: str


@dataclass(frozen=True)
class Terminal:
    """A part that llguidance's lexer matches; it has no references and does not match ""."""

    body: "Node"


Node = Chars | Seq | Alt | Repeat | Call | Terminal
EMPTY = Seq(())
NOTHING = Alt(())


def inner(node: Node) -> "tuple[Node, ...]":
    """Return the parts of a node; a character and a reference have none."""
    match node:
        case Seq(parts) | Alt(parts):
            return parts
        case Repeat(part) | Terminal(part):
            return (part,)
    return ()


def size(node: Node) -> int:
    """Return the number of nodes of a tree."""
    return 1 + sum(map(size, inner(node)))


def called(node: Node) -> Iterator[str]:
    """Yield the names of the rules that a node refers to."""
    if isinstance(node, Call):
        yield node.name
    for part in inner(node):
        yield from called(part)


def nullable(node: Node) -> bool:
    """Return whether a node without references matches the empty text."""
    match node:
        case Seq(parts):
            return all(map(nullable, parts))
        case Alt(parts):
            return any(map(nullable, parts))
        case Repeat(part, least):
            return least == 0 or nullable(part)
    return False


def impossible(node: Node) -> bool:
    """Return whether a node without references matches no text at all, not even the empty one."""
    match node:
        case Seq(parts):
            return any(map(impossible, parts))
        case Alt(parts):
            return all(map(impossible, parts))
        case Repeat(part, least):
            return least > 0 and impossible(part)
    return False


def without_empty(node: Node) -> Node:
    """Return a node that matches the same texts as a node without references, except ""."""
    if not nullable(node):
        return node
    match node:
        case Seq(parts):
            rests = [parts[place + 1 :] for place in range(len(parts))]
            begun = [
                Seq((without_empty(part), *rest)) for part, rest in zip(parts, rests, strict=True)
            ]
            return _one_of(begun)
        case Alt(parts):
            return _one_of([without_empty(part) for part in parts])
        case Repeat(part, _, most):
            once = without_empty(part)
            return NOTHING if most == 0 or impossible(once) else Repeat(once, 1, most)
    return node


def _one_of(nodes: Sequence[Node]) -> Node:
    return Alt(tuple(node for node in nodes if not impossible(node)))


def expression(node: Node) -> str:
    """Return a node without references as a regular expression of llguidance."""
    match node:
        case Chars(ranges, negated):
            listed = "".join(map(_range, ranges))
            single = len(ranges) == 1 and ranges[0][0] == ranges[0][1] and not negated
            return listed if single else f"[{'^' if negated else ''}{listed}]"
        case Seq(parts):
            return "".join(map(expression, parts))
        case Alt(parts):
            return f"(?:{'|'.join(map(expression, parts))})"
        case Repeat(part):
            return f"(?:{expression(part)}){times(node)}"
    raise AssertionError("a reference is not regular")


def times(node: Repeat) -> str:
    """Return the operator of a repetition."""
    match node.least, node.most:
        case 0, None:
            return "*"
        case 1, None:
            return "+"
        case 0, 1:
            return "?"
        case least, None:
            return f"{{{least},}}"
        case least, most:
            return f"{{{least},{most}}}"
    raise AssertionError("unreachable")


def _range(ends: tuple[int, int]) -> str:
    first, last = ends
    return _escaped(first) if first == last else f"{_escaped(first)}-{_escaped(last)}"


def _escaped(code: int) -> str:
    return rf"\u{{{code:x}}}"
