"""OpenAI's Responses API: request bodies.

Nothing is stored: `store` is accepted and every response says false. What refers to a stored
response is refused, and clients send the whole conversation each time.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from deepseek.server.body import (
    Body,
    Penalty,
    Several,
    ShortText,
    Stored,
    Text,
    TokenCount,
    ToolName,
    not_stored,
    text_only,
)
from deepseek.server.constraints import JsonSchema, ResponseFormat
from deepseek.server.dialects.harmless_fields import HarmlessFields
from deepseek.server.dialects.tool_types import no_server_tool
from deepseek.server.errors import ApiError
from deepseek.server.schema import (
    AllowedTools,
    CalledFunction,
    ChatMessage,
    ChatRequest,
    Function,
    MessagePart,
    SamplingFields,
    Tool,
    ToolCall,
)

MOST_ITEMS = 2048


class MessageItem(ChatMessage):
    """One turn of the conversation."""

    type: Literal["message"] = "message"
    id: ShortText | None = None
    status: ShortText | None = None
    phase: ShortText | None = None

    def messages(self) -> Iterator[ChatMessage]:
        """Yield the turn in our layout."""
        yield ChatMessage(role=self.role, content=self.text, tool_call_id=self.tool_call_id)


class FunctionCallItem(Body):
    """A call that the assistant made earlier."""

    type: Literal["function_call"]
    call_id: ShortText
    name: ToolName
    arguments: str
    id: ShortText | None = None
    status: ShortText | None = None

    def messages(self) -> Iterator[ChatMessage]:
        """Yield the call as a turn of the assistant."""
        function = CalledFunction(name=self.name, arguments=self.arguments)
        call = ToolCall(id=self.call_id, function=function)
        yield ChatMessage(role="assistant", tool_calls=[call])


class FunctionResultItem(Body):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: ShortText
    output: Annotated[str | Several[MessagePart], BeforeValidator(text_only)]
    id: ShortText | None = None
    status: ShortText | None = None

    def messages(self) -> Iterator[ChatMessage]:
        """Yield the result in our layout."""
        yield ChatMessage(role="tool", content=self.output, tool_call_id=self.call_id)


class ReasoningItem(Body):
    """Another model's reasoning in the conversation. The model does not see it."""

    type: Literal["reasoning"]
    id: ShortText | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: ShortText | None = None

    def messages(self) -> Iterator[ChatMessage]:
        """Yield nothing."""
        yield from ()


def item_kind(item: Any) -> str:
    """Return the type of an input item; a message need not say it."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return str(kind or "message")


def no_reference(item: Any) -> Any:
    """Return an input item, not validated yet.

    Raises:
        ValueError: it refers to one that would have to be stored.
    """
    return not_stored(item) if item_kind(item) == "item_reference" else item


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(item_kind),
    BeforeValidator(no_reference),
]


class FlatFunction(Body):
    """A function that may be called, in the flat layout of this route."""

    # First, so that a tool of another type is refused for its type, not for what it lacks.
    type: Annotated[Literal["function"], BeforeValidator(no_server_tool)]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        """Return the function in our layout."""
        fields = self.model_dump(exclude={"type"})
        return Tool(type="function", function=Function(**fields))


class NamedFunction(Body):
    """A function that the answer has to call."""

    type: Literal["function"]
    name: ToolName


class AllowedFunctions(Body):
    """The functions that an answer may call, or has to call one of."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[Several[NamedFunction], Field(min_length=1, max_length=128)]


ToolChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions


class TextFormat(JsonSchema):
    """`ResponseFormat` in the flat layout of this route."""

    type: Literal["text", "json_object", "json_schema"] = "text"


class TextConfig(Body):
    """Format of the answer's text, and its length, which the model does not control."""

    format: TextFormat = TextFormat()
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    """Settings of reasoning, of which the model has none."""

    effort: ShortText | None = None
    summary: ShortText | None = None
    generate_summary: ShortText | None = None
    context: ShortText | None = None
    mode: Literal["standard"] | None = None


class ResponseStreamOptions(Body):
    """Whether chunks are padded against eavesdroppers; they are not."""

    include_obfuscation: bool | None = None


class BackgroundOptions(Body):
    """When a response in the background is to be ready; there is no background."""

    completion_window: Literal["soonest"] | None = None


class ResponsesRequest(SamplingFields, HarmlessFields):
    """`POST /v1/responses`."""

    input: Text | Annotated[Several[InputItem], Field(min_length=1, max_length=MOST_ITEMS)]
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[ShortText] | None = None
    tools: Annotated[Several[FlatFunction], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig = TextConfig()
    reasoning: Reasoning | None = None
    stream_options: ResponseStreamOptions | None = None
    previous_response_id: Stored = None
    conversation: Stored = None
    prompt: Stored = None
    background: Literal[False] | None = None
    background_options: BackgroundOptions | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None  # of tools that servers run: none
    truncation: Literal["disabled"] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's log probabilities are asked for."""
        return "message.output_text.logprobs" in (self.include or ())

    def chat(self) -> ChatRequest:
        """Return the request in our layout."""
        instructions = self.instructions
        opening = [ChatMessage(role="system", content=instructions)] if instructions else []
        turns = (
            [ChatMessage(role="user", content=self.input)]
            if isinstance(self.input, str)
            else [message for item in self.input for message in item.messages()]
        )
        if not turns:
            raise ApiError(
                400,
                "The field input holds no message; add one.",
                param="input",
                code="invalid_value",
            )
        text_format = self.text.format
        return ChatRequest(
            model=self.model,
            messages=joined_calls([*opening, *turns]),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            max_tokens=self.max_output_tokens,
            logprobs=self.wants_logprobs or None,
            top_logprobs=self.top_logprobs if self.wants_logprobs else None,
            tools=[function.tool() for function in self.tools or ()] or None,
            tool_choice=_tool_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=ResponseFormat(
                type=text_format.type,
                json_schema=JsonSchema(**text_format.model_dump(exclude={"type"})),
            ).of_field("text.format"),
            experts=self.experts,
        )


def joined_calls(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Return messages with the calls of one turn in one message; this API lists them singly."""
    joined: list[ChatMessage] = []
    for message in messages:
        before = joined[-1] if joined else None
        if message.tool_calls and before is not None and before.role == "assistant":
            calls = [*(before.tool_calls or ()), *message.tool_calls]
            joined[-1] = before.model_copy(update={"tool_calls": calls})
        else:
            joined.append(message)
    return joined


def _tool_choice(choice: ToolChoice | None) -> Any:
    """Return `tool_choice` in our layout."""
    if isinstance(choice, NamedFunction):
        return _named(choice)
    if isinstance(choice, AllowedFunctions):
        return AllowedTools.of(choice.mode, [_named(tool) for tool in choice.tools])
    return choice


def _named(function: NamedFunction) -> Tool:
    return Tool(type="function", function=Function(name=function.name))
