"""Base of the argument declarations: validation, docstrings and error messages.

Each job has one pydantic dataclass in `arguments.py`. A field is an argument: name, type, range,
default and docstring. The class drives the Python function (`job`), the command line
(`cli/job_command.py`), the keys of a recipe (`read`), the request of `/v1/teach` and the reference
page (`cli/job_reference.py`).

This module imports nothing heavy, so that `--help` is fast.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import cleandoc, get_annotations, signature
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    ParamSpec,
    Self,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from deepseek.errors import ConfigError, shown
from deepseek.registry import nearest
from deepseek.terminal import visible

DECLARED = ConfigDict(
    extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
)
"""Pydantic configuration of every declaration: unknown keys are errors, a field's docstring is its
description, defaults are validated, and numbers are finite.
"""

UNIONS = (Union, UnionType)

IN_MEMORY = ("data", "dataset", "documents", "text", "texts", "train_dataset")
"""Names under which other libraries take text that is in memory."""

OTHER_TYPES = frozenset(
    {
        "bool_parsing",
        "bool_type",
        "dict_type",
        "float_parsing",
        "float_type",
        "int_from_float",
        "int_parsing",
        "int_parsing_size",
        "int_type",
        "is_instance_of",
        "mapping_type",
        "path_type",
        "string_type",
        "string_unicode",
        "tuple_type",
    }
)
"""Types of pydantic's errors about a value of another type than the declared one."""

WANTED: dict[Any, str] = {
    bool: "true or false",
    dict: "a mapping",
    float: "a number",
    int: "a whole number",
    Mapping: "a mapping",
    Path: "a path",
    str: "a text",
    tuple: "a list",
}
"""Types in the words of messages."""

LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
"""Bounds of `Field`, and their wording in messages."""


class Declaration:
    """Base class of all declarations; `arguments.py` shows how to write one."""

    unstored: ClassVar[frozenset[str]] = frozenset({"out", "run_folder", "quiet", "dry_run"})
    """Arguments that do not decide the result. A run can be resumed with other values of these."""

    @classmethod
    def read(cls, **given: Any) -> Self:
        """Return validated arguments.

        Args:
            given: arguments by name.

        Raises:
            ConfigError: an argument is wrong or missing; the message names it and the fix.
        """
        refuse_flags(given, cls)
        try:
            arguments = cls(**given)
        except ValidationError as error:
            raise ConfigError(f"{explain(error.errors()[0], cls)}.") from None
        arguments.check()
        return arguments

    def check(self) -> None:
        """Check rules that involve several arguments; raise `ConfigError` if one is broken."""

    def check_paths(self) -> None:
        """Check files and folders before any work; raise `UserError` if one cannot be used."""

    def as_json(self) -> dict[str, Any]:
        """Return the arguments that decide the result, as JSON values for the run's
        `request.json`.
        """
        values: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return {name: value for name, value in values.items() if name not in self.unstored}


@dataclass(frozen=True)
class Argument:
    """One field of a declaration.

    Attributes:
        name: name in Python and in recipes.
        declared: pydantic's field: description, default, range, examples.
        kind: type without `None`: a class, a `Literal`, or a generic type such as `tuple[str,
            ...]`.
        owner: class that declares the field; its docstring is the title of the group.
    """

    name: str
    declared: FieldInfo
    kind: Any
    owner: type[Declaration]

    @property
    def default(self) -> Any:
        """The default value."""
        return self.declared.get_default(call_default_factory=True)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a `Literal`; empty for other types."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def meaning(self) -> str:
        """Short description: up to the first semicolon or colon."""
        description = " ".join((self.declared.description or self.name).split())
        return description.partition(";")[0].partition(":")[0]

    @property
    def wanted(self) -> str:
        """The declared type in words."""
        return f"one of {', '.join(self.choices)}" if self.choices else in_words(self.kind)

    @property
    def limits(self) -> str:
        """The range in words, empty if there is none. A lower bound of 0 is left out as obvious."""
        words = []
        for bound in self.declared.metadata:
            for name, phrase in LIMITS.items():
                limit = getattr(bound, name, None)
                if limit is not None and (name, limit) != ("ge", 0):
                    number = f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
                    words.append(f"{phrase} {number}")
        return ", ".join(words)

    @property
    def about(self) -> str:
        """Description, range and default, as shown by `--help`, docstrings and the reference
        page.
        """
        description = " ".join((self.declared.description or "").split())
        text, _, default = description.partition("; default: ")
        if not default and not isinstance(self.default, bool) and "no default" not in text:
            default = _written(self.default)
        return "; ".join(filter(None, [text, self.limits, default and f"default: {default}"])) + "."


def in_words(kind: Any) -> str:
    """Return how messages name a type; for a union, its most specific alternative."""
    kind = _kind(kind)
    return WANTED.get(get_origin(kind) or kind, "a value of another type")


def arguments_of(declaration: type[Declaration]) -> dict[str, Argument]:
    """Return the arguments of a job by name, its own before those that it inherits."""
    by_name: dict[str, Argument] = {}
    for owner in declaration.__mro__:
        # Pydantic sets the description only in the class that declares the field; subclasses
        # inherit the field without it.
        fields: dict[str, FieldInfo] = owner.__dict__.get("__pydantic_fields__", {})
        for name in get_annotations(owner):
            if name in fields and name not in by_name:
                by_name[name] = Argument(name, fields[name], _kind(fields[name].annotation), owner)
    return by_name


P = ParamSpec("P")
D = TypeVar("D", bound=Declaration)
R = TypeVar("R")


def job(declaration: Callable[P, D]) -> Callable[[Callable[[D], R]], Callable[P, R]]:
    """Decorate a function that takes a declaration, so that callers pass the arguments instead.

    The decorated function has the signature and `Args` section of the declaration, for editors,
    type checkers and `help`.
    """
    declared = cast(type[D], declaration)
    public = signature(declaration)

    def decorate(run: Callable[[D], R]) -> Callable[P, R]:
        @wraps(run)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            by_position = public.bind_partial(*args).arguments
            return run(declared.read(**by_position, **kwargs))

        returns = get_type_hints(run)["return"]
        call.__signature__ = public.replace(return_annotation=returns)  # type: ignore[attr-defined]
        call.__doc__ = documented(run.__doc__ or "", declared)
        return call

    return decorate


def documented(text: str, declaration: type[Declaration]) -> str:
    """Return a docstring with the declaration's `Args` section, placed before `Raises`."""
    summary, raises, errors = cleandoc(text).partition("\n\nRaises:")
    lines = [
        f"    {argument.name}: {argument.about}" for argument in arguments_of(declaration).values()
    ]
    return "\n".join([summary, "", "Args:", *lines]) + raises + errors


def explain(error: Any, declaration: type[Declaration]) -> str:
    """Return a one-line message for an invalid argument: its name, what is wrong, and what is
    valid.

    Args:
        error: one entry of pydantic's `ValidationError.errors()`.
        declaration: the declaration that the arguments belong to.
    """
    where = ".".join(str(part) for part in error["loc"])
    arguments = arguments_of(declaration)
    if error["type"] == "unexpected_keyword_argument":
        return unknown(where, arguments)
    argument = arguments.get(where.partition(".")[0])
    known = _explain_argument(error, argument, where) if argument is not None else None
    if known is not None:
        return known
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "path_type":
        message = "Input should be a path"
    if message.startswith("Input should"):
        demand = message.removeprefix("Input should ")
        return visible(f"{where} must {demand}, not {shown(error['input'])}")
    return visible(f"{where}: {message}")


def _explain_argument(error: Any, argument: Argument, where: str) -> str | None:
    """Return the message for a wrong value of an argument; None: use pydantic's own.

    Args:
        error: one entry of pydantic's `ValidationError.errors()`.
        argument: the argument.
        where: name of the argument, followed by the keys or indices of the faulty part.
    """
    value = error["input"]
    message = None
    if error["type"] in OTHER_TYPES:
        about = f"({in_mid_sentence(argument.meaning)})"
        if _is_direct(argument, where):
            message = f"{argument.name} {about} must be {argument.wanted}, not {shown(value)}"
        elif get_origin(argument.kind) is tuple:
            wanted = in_words(get_args(argument.kind)[0])
            message = f"each of {argument.name} {about} must be {wanted}, not {shown(value)}"
    if argument.name != where:
        return message
    if type(value) is type(argument.default) and value == argument.default:
        message = f"{where} is missing; give it"
    elif error["type"] == "literal_error":
        hint = nearest(value[:80] if isinstance(value, str) else shown(value), argument.choices)
        message = f"{where} {shown(value)} is unknown; {hint}"
    elif error["type"] == "string_pattern_mismatch":
        examples = argument.declared.examples
        hint = f"write {_listed(examples)}" if examples else "leave control characters out"
        message = f"{where}={shown(value)} is not understood; {hint}"
    return message


def in_mid_sentence(text: str) -> str:
    """Return a text without its capital, unless its first word is an abbreviation (`JSONL`)."""
    return text if text[1:2].isupper() else f"{text[:1].lower()}{text[1:]}"


def _is_direct(argument: Argument, where: str) -> bool:
    """Return whether an error is about an argument's own value, not about a part of it.

    For a union, pydantic adds the alternative that it tried to the name.
    """
    return where == argument.name or get_origin(argument.declared.annotation) in UNIONS


def refuse_flags(given: Mapping[str, Any], declaration: type[Declaration]) -> None:
    """Raise `ConfigError` for True or False in place of a number; pydantic would read 1 or 0.

    Args:
        given: arguments by name.
        declaration: the declaration that the arguments belong to.
    """
    known = arguments_of(declaration)
    for name, value in given.items():
        if isinstance(value, bool) and name in known and known[name].kind in (int, float):
            raise ConfigError(f"{name}={value} must be a number.")


def unknown(key: str, names: Iterable[str]) -> str:
    """Return the message for a key that is not a field, with the nearest name, or with the way to
    learn from text in memory.
    """
    if key in IN_MEMORY and "from_jsonl" in names:
        return (
            f"{shown(key)} is no field here: text is read from files; write one JSON object per "
            "line with a `text` or `messages` field, such as with `to_json(FILE, lines=True, "
            "orient='records')`, and give from_jsonl=FILE"
        )
    return f"{shown(key)} is no field here; {nearest(key[:80], names)}"


def selected(values: Mapping[str, Any], declaration: type[Declaration]) -> dict[str, Any]:
    """Return the values whose names are arguments of the declaration."""
    names = arguments_of(declaration)
    return {name: value for name, value in values.items() if name in names}


def _kind(annotation: Any) -> Any:
    """Return `int` for `int | None`, and `Path`, the more specific type, for `str | Path |
    None`.
    """
    if get_origin(annotation) not in UNIONS:
        return annotation
    return [kind for kind in get_args(annotation) if kind is not type(None)][-1]


def _written(value: Any) -> str:
    """Return a value as a user writes it: several values in quotes, a mapping as in YAML."""
    if isinstance(value, tuple):
        return ", ".join(map(_quoted, value))
    return _quoted(value) if isinstance(value, Mapping) else str(value)


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _listed(words: list[Any]) -> str:
    return ", ".join(map(str, words[:-1])) + f", or {words[-1]}"
