"""Read llama.cpp's grammars (GBNF) and translate them to the Lark syntax of llguidance.

The syntax: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

from deepseek.engine.gbnf_terminals import by_character, joined
from deepseek.engine.gbnf_tree import (
    EMPTY,
    LAST_CHARACTER,
    Alt,
    Call,
    Chars,
    Node,
    Repeat,
    Seq,
    called,
)
from deepseek.errors import ConfigError, shown

MAX_NESTING = 40
"""Maximum depth of nested parentheses."""

MAX_REPETITION = 2000
"""Largest number in a repetition, as in llama.cpp."""

ROOT = "root"

TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\r\n]*)
    |(?P<define>::=)
    |(?P<name>[A-Za-z0-9_-]+)
    |(?P<literal>"(?:[^"\\]|\\.)*")
    |(?P<class>\[(?:[^\]\\]|\\.)*\])
    |(?P<repeat>[*+?]|\{\s*(?:[0-9]{1,9}\s*)?(?:,\s*(?:[0-9]{1,9}\s*)?)?\})
    |(?P<mark>[|().])""",
    re.VERBOSE | re.DOTALL,
)
CHARACTER = re.compile(
    r"\\x(?P<x>[0-9a-fA-F]{2})|\\u(?P<u>[0-9a-fA-F]{4})|\\U(?P<U>[0-9a-fA-F]{8})"
    r"|\\(?P<escape>[nrt]|[^A-Za-z0-9])|(?P<plain>[^\\])",
    re.DOTALL,
)
OPERATORS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
SURROGATES = range(0xD800, 0xE000)


@lru_cache(maxsize=64)
def lark_of(text: str) -> str:
    """Return a GBNF grammar in Lark syntax.

    Args:
        text: the grammar; its start rule is `root`.

    Raises:
        ConfigError: it is not valid GBNF, a rule is missing, or it nests too deep.
    """
    return joined(read(text), ROOT)


def reference_lark(text: str) -> str:
    """Return what `lark_of` does, but with a terminal per character: the slow reference."""
    return by_character(read(text), ROOT)


def read(text: str) -> dict[str, Node]:
    """Return the rules of a grammar by their names. Args and Raises: see `lark_of`."""
    reader = _Reader(list(_tokens(text)))
    reader.read()
    names = [ROOT, *chain.from_iterable(map(called, reader.rules.values()))]
    missing = [name for name in names if name not in reader.rules]
    if missing:
        raise _invalid(f"it has no rule {shown(missing[0])}")
    return reader.rules


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str


@dataclass
class _Reader:
    """Reads the rules of a grammar by recursive descent."""

    tokens: list[_Token]
    place: int = 0
    rules: dict[str, Node] = field(default_factory=dict)

    def read(self) -> None:
        """Read all rules."""
        while self.place < len(self.tokens):
            if not self._begins_rule():
                raise _invalid(f"a rule is expected at {shown(self._next().text)}")
            name = self._next().text
            self._next()
            self.rules[name] = self._alternatives(0)

    def _next(self) -> _Token:
        token = self.tokens[self.place]
        self.place += 1
        return token

    def _is(self, *texts: str) -> bool:
        return self.place < len(self.tokens) and self.tokens[self.place].text in texts

    def _begins_rule(self) -> bool:
        two = self.tokens[self.place : self.place + 2]
        return [token.kind for token in two] == ["name", "define"]

    def _alternatives(self, depth: int) -> Node:
        if depth > MAX_NESTING:
            raise _invalid(f"its parentheses nest more than {MAX_NESTING} levels deep")
        alternatives = [self._sequence(depth)]
        while self._is("|"):
            self._next()
            alternatives.append(self._sequence(depth))
        return alternatives[0] if len(alternatives) == 1 else Alt(tuple(alternatives))

    def _sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while self.place < len(self.tokens) and not self._is("|", ")") and not self._begins_rule():
            parts.append(self._repeated(self._item(depth)))
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def _item(self, depth: int) -> Node:
        token = self._next()
        match token.kind:
            case "name":
                return Call(token.text)
            case "literal":
                return _literal(token.text[1:-1])
            case "class":
                return _class(token.text[1:-1])
            case _ if token.text == ".":
                return Chars(((0, LAST_CHARACTER),))
            case _ if token.text == "(":
                node = self._alternatives(depth + 1)
                if not self._is(")"):
                    raise _invalid("a parenthesis is not closed")
                self._next()
                return node
        raise _invalid(f"{shown(token.text)} has nothing before it")

    def _repeated(self, node: Node) -> Node:
        """Return a node with the repetition that follows it, if there is one."""
        if self.place >= len(self.tokens) or self.tokens[self.place].kind != "repeat":
            return node
        return Repeat(node, *_bounds(self._next().text))


def _bounds(text: str) -> tuple[int, int | None]:
    """Return the minimum and maximum count of a repetition; maximum None: no limit."""
    if text in OPERATORS:
        return OPERATORS[text]
    low, comma, high = (part.strip() for part in text.strip("{}").partition(","))
    if not low and not high:
        raise _invalid("a repetition {} needs a number")
    least = int(low or 0)
    most = int(high) if high else None if comma else least
    if max(least, most or 0) > MAX_REPETITION:
        raise _invalid(f"a repetition is above {MAX_REPETITION}")
    if most is not None and least > most:
        raise _invalid(f"the repetition {text} ends before it begins")
    return least, most


def _tokens(text: str) -> Iterator[_Token]:
    """Yield the tokens of a grammar, without spaces and comments."""
    place = 0
    while place < len(text):
        match = TOKEN.match(text, place)
        if match is None:
            line = text.count("\n", 0, place) + 1
            raise _invalid(f"line {line} cannot be read at {shown(text[place : place + 20])}")
        place = match.end()
        if match.lastgroup is not None and match.lastgroup != "space":
            yield _Token(match.lastgroup, match[0])


def _character(text: str, place: int) -> tuple[str, int]:
    """Return the character at a place of a literal or a class, and the place after it."""
    match = CHARACTER.match(text, place)
    if match is None:
        raise _invalid(f"the escape {shown(text[place : place + 2])} is unknown")
    code = match["x"] or match["u"] or match["U"]
    if code is None:
        escape = match["escape"]
        return match["plain"] or ESCAPES.get(escape, escape), match.end()
    if int(code, 16) in SURROGATES or int(code, 16) > 0x10FFFF:
        raise _invalid(f"{match[0]} is no character")
    return chr(int(code, 16)), match.end()


def _literal(text: str) -> Node:
    """Return a literal, given without its quotes."""
    parts: list[Node] = []
    place = 0
    while place < len(text):
        character, place = _character(text, place)
        parts.append(Chars(((ord(character), ord(character)),)))
    return Seq(tuple(parts)) if parts else EMPTY


def _class(text: str) -> Node:
    """Return a class of characters, given without its brackets."""
    negated = text.startswith("^")
    place = int(negated)
    ranges: list[tuple[int, int]] = []
    while place < len(text):
        first, place = _character(text, place)
        last = first
        if text[place : place + 1] == "-" and place + 1 < len(text):
            last, place = _character(text, place + 1)
        if last < first:
            raise _invalid(f"the range {shown(f'{first}-{last}')} ends before it begins")
        ranges.append((ord(first), ord(last)))
    if not ranges:
        raise _invalid("a class of characters is empty")
    return Chars(tuple(ranges), negated)


def _invalid(reason: str) -> ConfigError:
    return ConfigError(f"The grammar cannot be used ({reason}); correct it.")
