"""Anthropic's Messages API: request bodies, and the events and whole replies of an answer."""

import json
from collections.abc import AsyncIterator, Iterator
from secrets import token_hex
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from deepseek.server.body import (
    Body,
    RetrieveField,
    Several,
    ShortText,
    StopText,
    TokenCount,
    ToolName,
    TopK,
    TopP,
    text_only,
)
from deepseek.server.constraints import JsonSchema, ResponseFormat
from deepseek.server.dialects.tool_types import no_server_tool
from deepseek.server.routes.chat_completions import ChatChunks
from deepseek.server.schema import (
    CalledFunction,
    ChatMessage,
    ChatRequest,
    ExpertsField,
    Function,
    Tool,
    ToolCall,
)
from deepseek.server.stream import Fields
from deepseek.server.tools import as_object

STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
"""Finish reason -> Anthropic's stop reason, for those that a stop text does not decide."""


class CacheControl(Body):
    """A mark at which the client wants the prompt to be cached; the server caches prompts by
    itself, in blocks of 64 tokens.
    """

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class ContentBlock(Body):
    """Fields of all blocks."""

    cache_control: CacheControl | None = None


class TextBlock(ContentBlock):
    """Text."""

    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


class Caller(Body):
    """Who made a call: the model itself."""

    type: Literal["direct"]


class ToolUseBlock(ContentBlock):
    """A call that the assistant made earlier."""

    type: Literal["tool_use"]
    caller: Caller | None = None
    id: ShortText
    name: ToolName
    input: dict[str, Any]


class ToolResultBlock(ContentBlock):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: ShortText
    content: Annotated[str | Several[TextBlock] | None, BeforeValidator(text_only)] = None
    is_error: bool | None = None


class ThinkingBlock(ContentBlock):
    """Another model's reasoning in the conversation. The model does not see it."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None


AnyBlock = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")
]


class Turn(Body):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: Annotated[
        str | Annotated[Several[AnyBlock], Field(min_length=1, max_length=2048)],
        BeforeValidator(text_only),
    ]

    def messages(self) -> Iterator[ChatMessage]:
        """Yield the turn in our layout: results of calls first, each a message of its own."""
        blocks = self._blocks()
        results = [block for block in blocks if isinstance(block, ToolResultBlock)]
        for result in results:
            yield ChatMessage(
                role="tool", content=joined_text(result.content), tool_call_id=result.tool_use_id
            )
        texts = [block for block in blocks if isinstance(block, TextBlock)]
        calls = [
            ToolCall(
                id=block.id,
                function=CalledFunction(name=block.name, arguments=json.dumps(block.input)),
            )
            for block in blocks
            if isinstance(block, ToolUseBlock)
        ]
        if texts or calls or not results:
            yield ChatMessage(role=self.role, content=joined_text(texts), tool_calls=calls or None)

    def _blocks(self) -> list[Any]:
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content


class AnthropicTool(Body):
    """A function that may be called."""

    # First, so that a tool of another type is refused for its type, not for what it lacks.
    type: Annotated[Literal["custom"] | None, BeforeValidator(no_server_tool)] = None
    name: ToolName
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None

    # Values that change nothing: calls come from the model and are sent once they are complete.
    eager_input_streaming: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None


class ToolChoice(Body):
    """Whether the answer may, must or must not be a call."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(Body):
    """Who asks; not read."""

    user_id: ShortText | None = None


class Thinking(Body):
    """Reasoning before the answer, which the model does not do, also where it may choose to."""

    type: Literal["disabled", "adaptive"]
    display: ShortText | None = None


class OutputFormat(Body):
    """The JSON schema that an answer must follow."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]

    def response_format(self) -> ResponseFormat:
        """Return the format in our layout."""
        schema = JsonSchema(schema_=self.schema_)
        wanted = ResponseFormat(type="json_schema", json_schema=schema)
        return wanted.of_field("output_config.format")


class OutputConfig(Body):
    """Format of the answer, and the effort of reasoning, of which the model has none."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class CountRequest(Body):
    """`POST /v1/messages/count_tokens`."""

    model: ShortText
    messages: Annotated[Several[Turn], Field(min_length=1, max_length=2048)]
    system: str | Several[TextBlock] | None = None
    tools: Annotated[Several[AnthropicTool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    cache_control: CacheControl | None = None

    def chat(self) -> ChatRequest:
        """Return the request in our layout.

        An assistant's turn at the end is continued, as this API defines.
        """
        choice = self.tool_choice or ToolChoice(type="auto")
        system = joined_text(self.system)
        opening = [ChatMessage(role="system", content=system)] if system else []
        return ChatRequest(
            model=self.model,
            messages=[*opening, *(m for turn in self.messages for m in turn.messages())],
            tools=[_tool(tool) for tool in self.tools or ()] or None,
            tool_choice=_tool_choice(choice) if self.tools else None,
            parallel_tool_calls=False if choice.disable_parallel_tool_use else None,
            continue_final_message=self.messages[-1].role == "assistant" or None,
        )


class MessagesRequest(CountRequest):
    """`POST /v1/messages`; `experts` and `retrieve` are our extensions, as in chat completions."""

    max_tokens: TokenCount
    stop_sequences: Annotated[Several[StopText], Field(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    speed: Literal["standard"] | None = None
    experts: ExpertsField = ExpertsField()
    retrieve: RetrieveField | None = None

    def chat(self) -> ChatRequest:
        """Return the request in our layout."""
        wanted = self.output_config.format
        generation = {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "experts": self.experts,
            "retrieve": self.retrieve,
            "response_format": wanted and wanted.response_format(),
        }
        return super().chat().model_copy(update=generation)


class MessageEvents:
    """The events of one answer: a message of content blocks, text or calls.

    Args:
        chunks: the answer, not started.
    """

    def __init__(self, chunks: ChatChunks) -> None:
        self._chunks = chunks
        self._id = f"msg_{token_hex(12)}"
        self._index = 0
        self._open = False  # whether a block is open; between two chunks, only text is

    async def events(self) -> AsyncIterator[Fields]:
        """Yield the events of a stream."""
        start = {**self._message([], None, None), "usage": self._usage()}
        yield {"type": "message_start", "message": start}
        async for choice in self._chunks.all_choices():
            delta = choice["delta"]
            for event in self._text(delta.get("content") or "", choice["expert"]):
                yield event
            for call in delta.get("tool_calls", ()):
                for event in self._call(call):
                    yield event
            if choice["finish_reason"]:
                for event in self._end(choice):
                    yield event

    def fold(self, events: list[Fields]) -> Fields:
        """Return the whole reply that the events add up to."""
        blocks: list[Fields] = []
        for event in events:
            if event["type"] == "content_block_start":
                blocks.append(dict(event["content_block"]))
            elif event["type"] == "content_block_delta":
                delta = event["delta"]
                if delta["type"] == "text_delta":
                    blocks[-1]["text"] += delta["text"]
                else:
                    blocks[-1]["input"] = json.loads(delta["partial_json"])
        end = next(event for event in events if event["type"] == "message_delta")
        message = self._message(blocks, end["delta"]["stop_reason"], end["delta"]["stop_sequence"])
        used = {name: value for name, value in end.items() if name not in ("type", "delta")}
        return {**message, **used}

    def _text(self, text: str, expert: str | None) -> Iterator[Fields]:
        if not text:
            return
        if not self._open:
            yield self._start({"type": "text", "text": "", "citations": None})
        delta = {"type": "text_delta", "text": text}
        event = {"type": "content_block_delta", "index": self._index, "delta": delta}
        yield {**event, "expert": expert}

    def _call(self, call: Fields) -> Iterator[Fields]:
        yield from self._stop()
        function = call["function"]
        yield self._start(
            {
                "type": "tool_use",
                "caller": {"type": "direct"},
                "id": f"toolu_{token_hex(12)}",
                "name": function["name"],
                "input": {},
            }
        )
        arguments = json.dumps(as_object(function["arguments"]), ensure_ascii=False)
        delta = {"type": "input_json_delta", "partial_json": arguments}
        yield {"type": "content_block_delta", "index": self._index, "delta": delta}
        yield from self._stop()

    def _end(self, choice: Fields) -> Iterator[Fields]:
        yield from self._stop()
        reached = choice["stop_reason"]
        reason = STOP_REASONS.get(
            choice["finish_reason"], "end_turn" if reached is None else "stop_sequence"
        )
        # A call can end with a stop text, which is not why the message ends then.
        sequence = reached if reason == "stop_sequence" else None
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        used = {**self._chunks.used(), "usage": self._usage()}
        yield {"type": "message_delta", "delta": delta, **used}
        yield {"type": "message_stop"}

    def _start(self, block: Fields) -> Fields:
        self._open = True
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _stop(self) -> Iterator[Fields]:
        """Close the open block, if there is one."""
        if self._open:
            yield {"type": "content_block_stop", "index": self._index}
            self._open = False
            self._index += 1

    def _message(self, blocks: list[Fields], reason: str | None, reached: str | None) -> Fields:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._chunks.head["model"],
            "content": blocks,
            "stop_reason": reason,
            "stop_sequence": reached,
            "stop_details": None,
            "container": None,
        }

    def _usage(self) -> Fields:
        usage = self._chunks.job.usage()
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_creation": None,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": None,
            "server_tool_use": None,
            "service_tier": None,
            "inference_geo": None,
        }


def joined_text(content: str | list[TextBlock] | None) -> str:
    """Return a text, or the joined texts of blocks; empty for None."""
    if isinstance(content, list):
        return "".join(block.text for block in content)
    return content or ""


def _tool(tool: AnthropicTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.input_schema)
    return Tool(type="function", function=function)


def _tool_choice(choice: ToolChoice) -> Any:
    """Return `tool_choice` in our layout."""
    if choice.type == "tool":
        return Tool(type="function", function=Function(name=choice.name or ""))
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]
