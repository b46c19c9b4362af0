"""Function calls: described in the prompt, enforced by a grammar where required, and parsed from
the model's text.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from deepseek.server.errors import ApiError
from deepseek.server.json_schema import moved
from deepseek.server.schema import AllowedTools, ChatMessage, ChatRequest, Tool

PREAMBLE = (
    "You may call one or more functions. They are described by JSON schemas between <tools> and </tools>:\n<tools>\n"
    "{tools}\n</tools>\nFor each call, write its name and arguments as JSON like this:\n"
    '<tool_call>\n{{"name": "a_function", "arguments": {{}}}}\n</tool_call>'
)
"""The tool prompt of Hermes and Qwen, for models whose chat template does not support tools."""

CLOSED = {"type": "object", "required": ["name", "arguments"], "additionalProperties": False}
MARK, END_MARK = "<tool_call>", "</tool_call>"
STARTS = (MARK, "{", "[")


@dataclass(frozen=True)
class Calling:
    """The function calls that one request allows.

    Attributes:
        tools: the offered tools; default: none.
        must: whether the answer has to be a call and nothing else; default: False.
        one: whether at most one call is allowed; default: False.
    """

    tools: tuple[Tool, ...] = ()
    must: bool = False
    one: bool = False

    @staticmethod
    def of(request: ChatRequest) -> "Calling":
        """Return the calls that a request allows.

        Raises:
            ApiError: `tool_choice` names a tool that the request does not describe.
        """
        tools = tuple(request.tools or ())
        choice: str | Tool | None
        if isinstance(request.tool_choice, AllowedTools):
            allowed = request.tool_choice.allowed_tools
            choice = allowed.mode
            tools = named(tools, allowed.tools)
        else:
            choice = request.tool_choice
        if isinstance(choice, Tool):
            tools = named(tools, [choice])
        if choice not in (None, "none", "auto") and not tools:
            raise ApiError(
                400,
                "tool_choice wants a tool that is not among tools; add it to tools.",
                param="tool_choice",
            )
        if choice == "none":
            return Calling()
        return Calling(tools, choice not in (None, "auto"), request.parallel_tool_calls is False)

    def schema(self) -> dict[str, Any] | None:
        """Return the JSON schema of a required call, None if no call is required."""
        if not self.must:
            return None
        schemas = {
            tool.function.name: tool.function.parameters or {"type": "object"}
            for tool in self.tools
        }
        calls = [
            {
                "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
                **CLOSED,
            }
            for name in schemas
        ]
        return {
            "anyOf": calls,
            "$defs": {name: moved(schema, f"#/$defs/{name}") for name, schema in schemas.items()},
        }

    def content_length(self, text: str) -> int:
        """Return how many characters of a partial answer can be sent as content already.

        The rest is, or may still become, a function call.
        """
        if not self.tools:
            return len(text)
        start = text.lstrip()
        if (
            self.must
            or not start
            or any(start.startswith(mark) or MARK.startswith(start) for mark in STARTS)
        ):
            return 0
        if MARK in text:
            return text.index(MARK)
        return len(text) - next(
            size for size in range(len(MARK), -1, -1) if text.endswith(MARK[:size])
        )

    def read(self, text: str) -> list[dict[str, Any]]:
        """Return the calls in a finished answer, each with `name` and `arguments` (JSON text)."""
        values = list(_marked(text)) if MARK in text else [_parsed(text)]
        calls = list(chain.from_iterable(map(self._calls, values)))
        return calls[:1] if self.one else calls

    def _calls(self, value: Any) -> Iterator[dict[str, Any]]:
        """Yield the calls of offered functions in a JSON value.

        Llama writes "parameters" instead of "arguments"; both are accepted.
        """
        # A list, not a set: "name" in free-form JSON can be any value, also an unhashable one.
        names = [tool.function.name for tool in self.tools]
        for call in value if isinstance(value, list) else [value]:
            if isinstance(call, dict) and call.get("name") in names:
                arguments = _unpacked(call.get("arguments", call.get("parameters")))
                yield {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}


def as_object(arguments: str) -> dict[str, Any]:
    """Return a call's arguments as an object, which some APIs require.

    Args:
        arguments: the arguments as JSON text; the object has a value of another kind as `value`.
    """
    value = json.loads(arguments)
    return value if isinstance(value, dict) else {"value": value}


def _unpacked(arguments: Any) -> Any:
    """Return the arguments that a model means: many write the object as text, or null for none."""
    if arguments is None:
        return {}
    value = _parsed(arguments) if isinstance(arguments, str) else None
    return value if isinstance(value, dict) else arguments


def _marked(text: str) -> Iterator[Any]:
    """Yield the JSON value after each mark; a text in it may contain marks itself."""
    _, mark, rest = text.partition(MARK)
    while mark:
        value, rest = _first_value(rest)
        yield value
        _, mark, rest = rest.partition(MARK)


def _first_value(text: str) -> tuple[Any, str]:
    """Return the JSON value at the beginning of a text, and the rest of the text.

    If there is none, or neither a mark nor the end follows it: None, and the whole text.
    """
    begun = text.lstrip()
    try:
        value, length = DECODER.raw_decode(begun)
    except (ValueError, RecursionError):
        return None, text
    rest = begun[length:].lstrip()
    return (value, rest) if not rest or rest.startswith((MARK, END_MARK)) else (None, text)


def _parsed(text: str) -> Any:
    """Return the value of a JSON text, None if it is not JSON."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def _finite(digits: str) -> float:
    """Return a number, which `NaN`, `Infinity` and `1e999` are not in JSON."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(digits)
    return value


DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)


def named(tools: Sequence[Tool], wanted: Sequence[Tool]) -> tuple[Tool, ...]:
    """Return the tools whose names are among those of `wanted`."""
    names = {tool.function.name for tool in wanted}
    return tuple(tool for tool in tools if tool.function.name in names)


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages for templates without tool support: calls and their results become text."""
    return [_plain(message) for message in messages]


def tool_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages for templates with tool support, which expect parsed call arguments."""
    rendered = [
        message.model_dump(exclude_none=True) | _base_fields(message) for message in messages
    ]
    for call in [call for message in rendered for call in message.get("tool_calls", ())]:
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return rendered


def described(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the tools as chat templates expect them."""
    return [tool.model_dump(exclude_none=True) for tool in tools]


def with_preamble(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return messages with the tool descriptions appended to the system message."""
    preamble = PREAMBLE.format(
        tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in described(tools))
    )
    if messages[0]["role"] == "system":
        return [
            {"role": "system", "content": f"{messages[0]['content']}\n\n{preamble}"},
            *messages[1:],
        ]
    return [{"role": "system", "content": preamble}, *messages]


def _base_fields(message: ChatMessage) -> dict[str, Any]:
    """Return role and text of a message; templates know the role "developer" as "system"."""
    return {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }


def _plain(message: ChatMessage) -> dict[str, Any]:
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.text}\n</tool_response>"}
    fields = _base_fields(message)
    for call in message.tool_calls or ():
        call_json = json.dumps(
            {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
        )
        fields["content"] = f"{fields['content']}\n{MARK}\n{call_json}\n</tool_call>".lstrip("\n")
    return fields


def _arguments(text: str) -> Any:
    """Return a call's arguments parsed from JSON, or unchanged if they are not valid JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
