"""Translate the grammar of an answer to the form that llguidance reads, within limits.

Grammars come from clients. Their size is checked here, and a separate process tries to compile them
first (`grammar_trial`).
"""

import json
import re
from typing import Any

from llguidance import LLParserLimits

from deepseek.engine.gbnf import lark_of
from deepseek.engine.request import Grammar
from deepseek.errors import ConfigError

MAX_CHARACTERS = {"json_schema": 1 << 16, "regex": 1 << 14, "lark": 1 << 14, "gbnf": 1 << 14}
"""Kind of grammar -> maximum number of characters."""

LIMITS = LLParserLimits(step_max_items=20_000, verbose_errors=False)
"""llguidance's limits on the work for one token."""

NO_FORCING = {"no_forcing": True}
"""Option of llguidance. Without it, one step computes all text that has no alternative, such as the
million letters of `(a{1000}){1000}`.
"""

WHITESPACE = r"\n?[ \t]{0,32}"
"""Pattern of the whitespace between JSON tokens: it allows pretty printing, but no endless run of
blanks.
"""

REAL_YEAR = r"^([1-9]|0[1-9]|00[1-9]|000[1-9])"
"""Pattern for the start of a date. JSON Schema's formats allow the year 0, which the date types of
most languages cannot represent.
"""

NAMES = {"json_schema": "JSON schema", "regex": "regular expression"}
"""Kind of grammar -> its name in messages; the others are called "grammar"."""

PLACE = re.compile(r"^(?:at )?\d+\(\d+\): (?:failed to compile JSON schema: )?")
"""Position of a mistake in our translation; dropped, because the client has not seen that."""

SETTINGS = re.compile(r"%llguidance\s*(\{[^{}]*\})?")
"""llguidance's settings in a client's grammar; removed."""


def llguidance_form(grammar: Grammar) -> str:
    """Return a grammar in the form that llguidance reads.

    Args:
        grammar: the grammar, from a client.

    Raises:
        ConfigError: it is too large or malformed.
    """
    check_length(grammar)
    match grammar.kind:
        case "json_schema":
            lark = f"start: %json {json.dumps(_schema(grammar))}"
        case "regex":
            lark = f"start: /{_pattern(grammar.text)}/"
        case "gbnf":
            lark = lark_of(grammar.text)
        case "lark":
            lark = SETTINGS.sub("", grammar.text)
    return f"%llguidance {json.dumps(NO_FORCING)}\n{lark}"


def check_length(grammar: Grammar) -> None:
    """Raise `ConfigError` for a grammar with too many characters."""
    most = MAX_CHARACTERS[grammar.kind]
    if len(grammar.text) > most:
        raise unusable(grammar, f"it is longer than {most} characters")


def unusable(grammar: Grammar, reason: str) -> ConfigError:
    """Return the error for a grammar that cannot be used.

    Args:
        grammar: the grammar.
        reason: why, as a clause.
    """
    name = NAMES.get(grammar.kind, "grammar")
    reason = PLACE.sub("", reason)
    return ConfigError(f"The {name} cannot be used ({reason}); correct it.")


def _schema(grammar: Grammar) -> dict[str, Any]:
    """Return a JSON schema with our settings."""
    try:
        schema = json.loads(grammar.text)
    except ValueError as error:
        raise unusable(grammar, f"it is not JSON: {error}") from None
    except RecursionError:
        raise unusable(grammar, "it nests too deep") from None
    if not isinstance(schema, dict):
        raise unusable(grammar, "it is not an object")
    return {**_with_real_years(schema), "x-guidance": {"whitespace_pattern": WHITESPACE}}


def _pattern(regex: str) -> str:
    """Return a regular expression without the anchors around it: it always matches whole texts."""
    inner = regex.removeprefix("^")
    ends = inner.endswith("$") and not re.search(r"(?<!\\)(?:\\\\)*\\\$\Z", inner)
    inner = inner[:-1] if ends else inner
    grouped = f"(?:{inner})" if inner != regex and "|" in inner else inner
    return re.sub(r"\\.|/", lambda part: "\\/" if part[0] == "/" else part[0], grouped)


def _with_real_years(schema: Any) -> Any:
    """Return a JSON schema whose date formats exclude the year 0, unless they have their own
    pattern.
    """
    if isinstance(schema, list):
        return [_with_real_years(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {
        key: value if key in ("const", "enum") else _with_real_years(value)
        for key, value in schema.items()
    }
    return (
        {"pattern": REAL_YEAR, **changed}
        if schema.get("format") in ("date", "date-time")
        else changed
    )
