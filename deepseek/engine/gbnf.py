"""Translate llama.cpp's grammars (GBNF) to the Lark syntax of llguidance.

A terminal of llguidance takes the longest text that it can: in `[a-z]+ "x"`, a terminal of several
letters would swallow the last "x", and the grammar could never be completed. So each character is a
terminal of its own here, which keeps the language exactly. llguidance's own converter joins
characters.

The syntax: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from deepseek.errors import ConfigError, shown

MAX_NESTING = 40
"""Most levels of nested parentheses."""

MAX_REPETITION = 2000
"""Largest number in a repetition, as in llama.cpp."""

ROOT = "root"

TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\r\n]*)
    |(?P<define>::=)
    |(?P<name>[A-Za-z0-9_-]+)
    |(?P<literal>"(?:[^"\\]|\\.)*")
    |(?P<class>\[(?:[^\]\\]|\\.)*\])
    |(?P<repeat>[*+?]|\{\s*[0-9]{0,9}\s*(?:,\s*[0-9]{0,9}\s*)?\})
    |(?P<mark>[|().])""",
    re.VERBOSE | re.DOTALL,
)
CHARACTER = re.compile(
    r"\\x(?P<x>[0-9a-fA-F]{2})|\\u(?P<u>[0-9a-fA-F]{4})|\\U(?P<U>[0-9a-fA-F]{8})"
    r"|\\(?P<escape>[nrt]|[^A-Za-z0-9])|(?P<plain>[^\\])",
    re.DOTALL,
)
ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
SURROGATES = range(0xD800, 0xE000)


def lark_of(text: str) -> str:
    """Return a GBNF grammar in Lark syntax.

    Args:
        text: the grammar; its first rule to match is `root`.

    Raises:
        ConfigError: it is no GBNF, a rule is missing, or it nests too deep.
    """
    reader = _Reader(list(_tokens(text)))
    reader.read()
    return reader.lark()


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str


@dataclass
class _Reader:
    """Reads the rules of a grammar by recursive descent and writes each in Lark syntax."""

    tokens: list[_Token]
    place: int = 0
    rules: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=lambda: {ROOT: 0})

    def read(self) -> None:
        """Read all rules."""
        while self.place < len(self.tokens):
            if not self._begins_rule():
                raise _invalid(f"a rule is expected at {shown(self._next().text)}")
            name = self._next().text
            self._next()
            self.rules[name] = self._alternatives(0)

    def lark(self) -> str:
        """Return the rules in Lark syntax, numbered, since names of Lark have other rules."""
        missing = [name for name in self.numbers if name not in self.rules]
        if missing:
            raise _invalid(f"it has no rule {shown(missing[0])}")
        numbered = [f"{self._name(name)}: {body}" for name, body in self.rules.items()]
        return "\n".join([f"start: {self._name(ROOT)}", *numbered])

    def _name(self, name: str) -> str:
        return f"r{self.numbers.setdefault(name, len(self.numbers))}"

    def _next(self) -> _Token:
        token = self.tokens[self.place]
        self.place += 1
        return token

    def _is(self, *texts: str) -> bool:
        return self.place < len(self.tokens) and self.tokens[self.place].text in texts

    def _begins_rule(self) -> bool:
        two = self.tokens[self.place : self.place + 2]
        return [token.kind for token in two] == ["name", "define"]

    def _alternatives(self, depth: int) -> str:
        if depth > MAX_NESTING:
            raise _invalid(f"its parentheses nest more than {MAX_NESTING} levels deep")
        alternatives = [self._sequence(depth)]
        while self._is("|"):
            self._next()
            alternatives.append(self._sequence(depth))
        return " | ".join(alternatives)

    def _sequence(self, depth: int) -> str:
        parts: list[str] = []
        while self.place < len(self.tokens) and not self._is("|", ")") and not self._begins_rule():
            parts.append(self._item(depth) + self._repetition())
        return " ".join(parts) or '""'

    def _item(self, depth: int) -> str:
        token = self._next()
        match token.kind:
            case "name":
                return self._name(token.text)
            case "literal":
                return _literal(token.text[1:-1])
            case "class":
                return _class(token.text[1:-1])
            case _ if token.text == ".":
                return r"/[\u{0}-\u{10FFFF}]/"
            case _ if token.text == "(":
                inner = self._alternatives(depth + 1)
                if not self._is(")"):
                    raise _invalid("a parenthesis is not closed")
                self._next()
                return f"({inner})"
        raise _invalid(f"{shown(token.text)} has nothing before it")

    def _repetition(self) -> str:
        if self.place >= len(self.tokens) or self.tokens[self.place].kind != "repeat":
            return ""
        text = self._next().text
        numbers = [int(number) for number in re.findall("[0-9]+", text)]
        if text.startswith("{") and not numbers:
            raise _invalid("a repetition {} needs a number")
        if any(number > MAX_REPETITION for number in numbers):
            raise _invalid(f"a repetition is above {MAX_REPETITION}")
        if len(numbers) == 2 and numbers[0] > numbers[1]:
            raise _invalid(f"the repetition {text} ends before it begins")
        return re.sub(r"\s", "", text).replace("{,", "{0,")


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
    """Return the character at a place of a literal or a class, and the place behind it."""
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


def _literal(text: str) -> str:
    """Return a literal, given without its quotes, as one terminal for each character."""
    terminals: list[str] = []
    place = 0
    while place < len(text):
        character, place = _character(text, place)
        terminals.append(f"/{_escaped(character)}/")
    return f"({' '.join(terminals)})" if terminals else '""'


def _class(text: str) -> str:
    """Return the terminal for a class of characters, given without its brackets."""
    negated = text.startswith("^")
    place = int(negated)
    ranges: list[str] = []
    while place < len(text):
        first, place = _character(text, place)
        last = first
        if text[place : place + 1] == "-" and place + 1 < len(text):
            last, place = _character(text, place + 1)
        if last < first:
            raise _invalid(f"the range {shown(f'{first}-{last}')} ends before it begins")
        ranges.append(f"{_escaped(first)}-{_escaped(last)}")
    if not ranges:
        raise _invalid("a class of characters is empty")
    return f"/[{'^' if negated else ''}{''.join(ranges)}]/"


def _escaped(character: str) -> str:
    return rf"\u{{{ord(character):x}}}"


def _invalid(reason: str) -> ConfigError:
    return ConfigError(f"The grammar cannot be used ({reason}); correct it.")
