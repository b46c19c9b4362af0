"""Fields that constrain an answer's text: JSON schemas, regular expressions, choices and grammars.

Servers name them differently; clients of OpenAI, vLLM and llama.cpp are understood.
"""

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PrivateAttr, StringConstraints

from deepseek.engine.grammar import check_length
from deepseek.engine.request import Grammar
from deepseek.server.body import Body, Several, ToolName
from deepseek.server.errors import ApiError, about
from deepseek.server.json_body import parsed
from deepseek.server.json_schema import closed

T = TypeVar("T")
Schema = dict[str, Any]
FormatKind = Literal["text", "json_object", "json_schema", "regex", "grammar"]
Pattern = Annotated[str, StringConstraints(min_length=1)]
Choices = Annotated[Several[Pattern], Field(min_length=1, max_length=1024)]

LARK = re.compile(r"^[^\S\n]*(?:%llguidance\b|\??start\s*:(?!:=))", re.MULTILINE)
"""Matches a rule that only Lark grammars have; any other grammar is llama.cpp's GBNF."""


class JsonSchema(Body):
    """The schema that an answer must follow."""

    name: ToolName = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """Free text, any JSON object, JSON that follows a schema, or text that follows a regular
    expression or a grammar.

    OpenAI puts the schema into `json_schema`, llama.cpp beside the type.
    """

    type: FormatKind
    json_schema: JsonSchema = JsonSchema()
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    pattern: Pattern | None = None
    grammar: Pattern | None = None

    _field: str = PrivateAttr("response_format")

    @property
    def field(self) -> str:
        """The field of the request that holds this format, for error messages."""
        return self._field

    def of_field(self, field: str) -> "ResponseFormat":
        """Return this format as that of another field: other APIs have their own names for it."""
        self._field = field
        return self

    def constraint(self) -> Grammar | None:
        """Return the constraint, None for free text.

        Raises:
            ApiError: the type needs a field that is missing, or the constraint is too long.
        """
        match self.type:
            case "text":
                return None
            case "json_object":
                return _made(json_grammar, self.schema_ or {"type": "object"}, self.field)
            case "json_schema":
                inner = self.json_schema.schema_
                schema = self.schema_ if inner is None else inner
                # Only OpenAI's chat completions nest the schema.
                path = "json_schema.schema" if self.field == "response_format" else "schema"
                return _made(json_grammar, self._needed(schema, path), self.field)
            case "regex":
                return Grammar("regex", self._needed(self.pattern, "pattern"))
            case "grammar":
                return _made(grammar_of, self._needed(self.grammar, "grammar"), self.field)

    def _needed(self, value: T | None, path: str) -> T:
        """Return a field that the type needs; `path` leads to it."""
        if value is None:
            where = f"{self.field}.{path}"
            raise ApiError(400, f"The field {where} is missing; send it.", param=where)
        return value


class StructuredOutputs(Body):
    """vLLM's constraints, of which one is set."""

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None

    def constraints(self, prefix: str) -> dict[str, Grammar | None]:
        """Return the constraints by the names of their fields, None for those that are not set.

        Args:
            prefix: what the request has before these names, such as "guided_".

        Raises:
            ApiError: the schema is text that is not a JSON object, or a constraint is too long.
        """
        makers: dict[str, tuple[Callable[[Any], Grammar], Any]] = {
            "json": (lambda schema: json_grammar(_parsed(schema)), self.json_),
            "regex": (lambda pattern: Grammar("regex", pattern), self.regex),
            "choice": (choice_of, self.choice),
            "grammar": (grammar_of, self.grammar),
            "json_object": (lambda _: json_grammar({"type": "object"}), self.json_object or None),
        }
        return {
            f"{prefix}{name}": _made(make, value, f"{prefix}{name}")
            for name, (make, value) in makers.items()
        }


class ConstraintFields(Body):
    """Constraints of the routes that generate: OpenAI's `response_format`, vLLM's
    `structured_outputs` (and its older `guided_...`), llama.cpp's `grammar` and `json_schema`.
    """

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None
    json_schema: Schema | None = None
    grammar: str | None = None

    @property
    def is_constrained(self) -> bool:
        """Whether a field may constrain the answer, told without making its grammar."""
        formatted = self.response_format is not None and self.response_format.type != "text"
        fields = (
            self.structured_outputs,
            self.guided_json,
            self.guided_regex,
            self.guided_choice,
            self.guided_grammar,
            self.json_schema,
            self.grammar,
        )
        return formatted or any(field is not None for field in fields)

    def constraint(self, check: Callable[[Grammar], object] | None = None) -> Grammar | None:
        """Return the constraint on the answer, None for free text.

        Args:
            check: called with the constraint; the errors that it raises name the field. Default:
                none.

        Raises:
            ApiError: there are several, or one is malformed.
        """
        older = StructuredOutputs(
            json_=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        newer = self.structured_outputs or StructuredOutputs()
        response_format = self.response_format or ResponseFormat(type="text")
        by_field = {
            response_format.field: response_format.constraint(),
            "json_schema": _made(json_grammar, self.json_schema, "json_schema"),
            "grammar": _made(grammar_of, self.grammar or None, "grammar"),
            **newer.constraints("structured_outputs."),
            **older.constraints("guided_"),
        }
        constraints = {name: each for name, each in by_field.items() if each is not None}
        if len(constraints) > 1:
            raise ApiError(
                400,
                f"{' and '.join(constraints)} constrain the same answer; send one of them.",
                param=next(iter(constraints)),
            )
        if check is not None:
            for field, constraint in constraints.items():
                with about(field):
                    check(constraint)
        return next(iter(constraints.values()), None)


def json_grammar(schema: Schema) -> Grammar:
    """Return the constraint to JSON that follows a schema, closed if it does not say.

    Raises:
        ConfigError: the schema is too long.
    """
    check_length(Grammar("json_schema", json.dumps(schema)))
    return Grammar("json_schema", json.dumps(closed(schema)))


def choice_of(texts: list[str]) -> Grammar:
    """Return the constraint to one of some texts.

    Raises:
        ConfigError: they are too long.
    """
    check_length(Grammar("regex", "|".join(texts)))
    return Grammar("regex", "|".join(map(_literal, texts)))


def grammar_of(text: str) -> Grammar:
    """Return the constraint to a grammar in Lark syntax or that of llama.cpp.

    Raises:
        ConfigError: it is too long.
    """
    check_length(Grammar("gbnf", text))
    return Grammar("lark" if LARK.search(text) else "gbnf", text)


def _literal(text: str) -> str:
    """Return the regular expression for a text."""
    return "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


def _made(make: Callable[[T], Grammar], value: T | None, field: str) -> Grammar | None:
    """Return the constraint that a field states, None if it is not set.

    Args:
        make: makes the constraint of a value.
        value: value of the field.
        field: its name, for errors.

    Raises:
        ApiError: the value is malformed or too long.
    """
    if value is None:
        return None
    with about(field):
        return make(value)


def _parsed(schema: Schema | str) -> Schema:
    """Return a JSON schema that may have been sent as JSON text.

    Raises:
        ApiError: the text breaks a rule for bodies (see `json_body.parsed`), or is no object.
        ConfigError: it is too long.
    """
    if not isinstance(schema, str):
        return schema
    check_length(Grammar("json_schema", schema))
    value = parsed(schema.encode(), "JSON schema")
    if not isinstance(value, dict):
        raise ApiError(400, "The JSON schema is not the text of a JSON object; correct it.")
    return value
