"""Say what is wrong with a field of a request, from Pydantic's validation errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepseek.packs.manifest import printable
from deepseek.packs.names import NAME

EXPECTED = {
    "string_type": "a text",
    "string_unicode": "a text of Unicode characters",
    "list_type": "a list",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
"""What a field should be, by Pydantic's type of error for a wrong type."""


RANGES = {
    "too_short": "{container} of {min_length} or more items",
    "too_long": "{container} of {max_length} or fewer items",
    "string_too_short": "a text of {min_length} or more characters",
    "string_too_long": "a text of {max_length} or fewer characters",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}
"""The same for values of the right type that are too long, too short, too large or too small."""


FORMS = {
    "string_pattern_mismatch": "{described}",
    "union_tag_invalid": "an object of one of the types {expected_tags}",
    "union_tag_not_found": "an object with a type",
}
"""The same for errors that state what would be valid."""

RIGHT_TYPE = {*RANGES, "string_pattern_mismatch"}
"""Errors of values that have the right type."""


PARAMETERS = {"path", "query", "header", "cookie"}
"""Places of a mistake outside the body."""


TOOL_NAME = r"^[A-Za-z0-9_-]{1,64}$"
DIGITS = r"^[0-9]{1,9}$"
WITHOUT_NUL = r"^[^\x00]*$"

PATTERNS = {
    TOOL_NAME: "1 to 64 letters, digits, hyphens or underscores",
    DIGITS: "the id of a token",
    WITHOUT_NUL: "a text without NUL",
    f"^{NAME.pattern}$": "at most 64 letters, digits, dots, hyphens or underscores, the first a "
    "letter or a digit",
}
"""What a text should be, by the regular expression that it does not match."""


@dataclass(frozen=True)
class FieldError:
    """What is wrong with one field of a request.

    Attributes:
        message: the error in one sentence, with what to do.
        field: path of the field, with dots; "": the whole body.
        code: identifier for programs.
    """

    message: str
    field: str
    code: str


def field_error(mistakes: Sequence[dict[str, Any]], body: Any) -> FieldError:
    """Return what Pydantic's validation errors say, naming one field.

    A field that may have several types has errors for each of them. The errors with the longest
    path belong to the type that fits best; if none fits, all types are named. A value of the right
    type that is out of its range, or of the wrong form, fits best.

    Args:
        mistakes: the errors of one request.
        body: the request's parsed body, if it has one.
    """
    paths = [field_path(mistake, body) for mistake in mistakes]
    same_field = [
        (path, mistake)
        for path, mistake in zip(paths, mistakes, strict=True)
        if path[: len(paths[0])] == paths[0]
    ]
    right_type = any(mistake["type"] in RIGHT_TYPE for _, mistake in same_field)
    fitting = [
        (path, mistake)
        for path, mistake in same_field
        if not (right_type and mistake["type"].endswith("_type"))
    ]
    chosen = max((path for path, _ in fitting), key=len)
    where = printable(".".join(chosen))
    kinds = [mistake for path, mistake in fitting if path == chosen]
    code = "invalid_value"
    match kinds[0]["type"]:
        case "extra_forbidden":
            message = f"The field {where} is not supported; leave it out."
            code = "unsupported_field"
        case "missing":
            message = f"The field {where} is missing; send it."
        case "value_error":
            reason = printable(str(kinds[0]["ctx"]["error"]))
            message = f"The field {where} is invalid: {reason}."
        case _:
            reasons = " or ".join(dict.fromkeys(_expected(mistake) for mistake in kinds))
            message = f"The field {where or 'body'} is invalid: it should be {reasons}."
    return FieldError(message, where, code)


def field_path(mistake: dict[str, Any], body: Any) -> tuple[str, ...]:
    """Return the path of the field at fault, without Pydantic's names of union branches.

    Args:
        mistake: the error; its `loc` holds keys, indexes and names of branches.
        body: the parsed body; None: the field is a parameter, which has no branches.
    """
    place, parts = mistake["loc"][0], list(mistake["loc"][1:])
    if body is None or place in PARAMETERS:
        return tuple(map(str, parts))
    path = _followed(parts, body)
    if mistake["type"] == "missing":
        return (*map(str, path), str(parts[-1]))
    if path[-1:] != parts[-1:]:
        # A branch can have the name of a field, such as "text": not each part that is a key is one.
        beyond = _followed(parts, body, skipped=True)
        path = beyond if beyond[-1:] == parts[-1:] else path
    return tuple(map(str, path))


def _followed(parts: Sequence[Any], body: Any, *, skipped: bool = False) -> list[Any]:
    """Return those of `parts` that are keys and indexes of `body`.

    Args:
        parts: keys, indexes and names of branches, from the outermost.
        body: the parsed body.
        skipped: whether a part that is the type of an object is a branch even if it is a key too;
            default: no.
    """
    path = []
    for part in parts:
        if skipped and isinstance(body, dict) and part == body.get("type"):
            continue
        known = part in body if isinstance(body, dict) else isinstance(part, int)
        if known and isinstance(body, dict | list):
            body = body[part]
            path.append(part)
    return path


def _expected(mistake: dict[str, Any]) -> str:
    """Return what a field should be, as the continuation of "it should be"."""
    form = (RANGES | FORMS).get(mistake["type"])
    if form is not None:
        limits = mistake["ctx"]
        pattern = limits.get("pattern", "")
        return form.format(
            **limits,
            described=PATTERNS.get(pattern, f"a text that matches {pattern}"),
            container="an object" if limits.get("field_type") == "Dictionary" else "a list",
        )
    usual = printable(mistake["msg"]).removeprefix("Input should be ")
    return EXPECTED.get(mistake["type"], usual[:1].lower() + usual[1:])
