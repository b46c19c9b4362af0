"""Fields that constrain an answer's text: JSON schemas, regular expressions, choices and grammars.

Servers name them differently; clients of OpenAI, vLLM and llama.cpp are understood.
"""

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, StringConstraints

from deepseek.engine.request import Grammar
from deepseek.server.body import Body, Several, ToolName
from deepseek.server.errors import ApiError
from deepseek.server.json_schema import closed

T = TypeVar("T")
Schema = dict[str, Any]
FormatKind = Literal["text", "json_object", "json_schema", "regex", "grammar"]
Pattern = Annotated[str, StringConstraints(min_length=1)]
Choices = Annotated[Several[Pattern], Field(min_length=1, max_length=1024)]

LARK = re.compile(r"^\s*(?:%llguidance\b|\??start\s*:(?!:=))", re.MULTILINE)
"""What only a grammar in Lark syntax has; any other is one of llama.cpp (GBNF)."""


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

    def constraint(self) -> Grammar | None:
        """Return the constraint, None for free text.

        Raises:
            ApiError: the type needs a field that is missing.
        """
        match self.type:
            case "text":
                return None
            case "json_object":
                return json_grammar(self.schema_ or {"type": "object"})
            case "json_schema":
                return json_grammar(_present(self.json_schema.schema_ or self.schema_, "schema"))
            case "regex":
                return Grammar("regex", _present(self.pattern, "pattern"))
            case "grammar":
                return grammar_of(_present(self.grammar, "grammar"))


class StructuredOutputs(Body):
    """vLLM's constraints, of which one is set."""

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None

    def constraints(self) -> dict[str, Grammar]:
        """Return all constraints, by the names of their fields."""
        found = {
            "json": None if self.json_ is None else json_grammar(_parsed(self.json_)),
            "regex": None if self.regex is None else Grammar("regex", self.regex),
            "choice": None if self.choice is None else choice_of(self.choice),
            "grammar": None if self.grammar is None else grammar_of(self.grammar),
            "json_object": json_grammar({"type": "object"}) if self.json_object else None,
        }
        return {name: grammar for name, grammar in found.items() if grammar is not None}


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

    def constraint(self) -> Grammar | None:
        """Return the constraint on the answer, None for free text.

        Raises:
            ApiError: there are several, or one is malformed.
        """
        older = StructuredOutputs(
            json_=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        named = self.structured_outputs or StructuredOutputs()
        wanted = self.response_format or ResponseFormat(type="text")
        own = {
            "response_format": wanted.constraint(),
            "json_schema": None if self.json_schema is None else json_grammar(self.json_schema),
            "grammar": grammar_of(self.grammar) if self.grammar else None,
        }
        found = {
            **{name: grammar for name, grammar in own.items() if grammar is not None},
            **{f"structured_outputs.{name}": each for name, each in named.constraints().items()},
            **{f"guided_{name}": grammar for name, grammar in older.constraints().items()},
        }
        if len(found) > 1:
            raise ApiError(
                400,
                f"{' and '.join(found)} constrain the same answer; send one of them.",
                param=next(iter(found)),
            )
        return next(iter(found.values()), None)


def json_grammar(schema: Schema) -> Grammar:
    """Return the constraint to JSON that follows a schema, closed if it does not say."""
    return Grammar("json_schema", json.dumps(closed(schema)))


def choice_of(texts: list[str]) -> Grammar:
    """Return the constraint to one of some texts."""
    return Grammar("regex", "|".join(map(_literal, texts)))


def grammar_of(text: str) -> Grammar:
    """Return the constraint to a grammar in Lark syntax or that of llama.cpp."""
    return Grammar("lark" if LARK.search(text) else "gbnf", text)


def _literal(text: str) -> str:
    """Return the regular expression for a text."""
    return "".join(c if c.isascii() and c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


def _parsed(schema: Schema | str) -> Schema:
    """Return a JSON schema that may have been sent as JSON text."""
    if isinstance(schema, dict):
        return schema
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(400, "The JSON schema is not the text of a JSON object; correct it.")
    return value


def _present(value: T | None, field: str) -> T:
    if value is None:
        raise ApiError(
            400,
            f"The response_format needs the field {field}; send it.",
            param=f"response_format.{field}",
        )
    return value
