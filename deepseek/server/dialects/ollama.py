"""Ollama's API: request bodies, and the lines of JSON that an answer consists of."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from deepseek.engine.request import TokenUsage
from deepseek.server.body import Body, Penalty, Several, ShortText, StopText, ToolName, TopK, TopP
from deepseek.server.constraints import JsonSchema, ResponseFormat
from deepseek.server.errors import ApiError
from deepseek.server.metrics import spoken
from deepseek.server.prompt import can_continue
from deepseek.server.routes.chat_completions import ChatChunks
from deepseek.server.routes.completions import CompletionChunks
from deepseek.server.schema import (
    CalledFunction,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ExpertsField,
    Tool,
    ToolCall,
)
from deepseek.server.service import OLLAMA_TAG
from deepseek.server.stream import Fields
from deepseek.server.tools import as_object

NANOSECONDS = 1_000_000_000


class Options(Body):
    """Sampling parameters, and settings of Ollama's runner, which this server does not need."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: StopText | Annotated[Several[StopText], Field(max_length=16)] | None = None
    num_predict: Annotated[int, Field(ge=-2, le=1 << 20)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_last_n: int | None = None
    """0 turns the penalties off; else they look at the whole text, whatever it says"""

    # Values that change nothing; any other value is refused.
    typical_p: Literal[1] | Annotated[float, Field(ge=1, le=1)] | None = None
    tfs_z: Literal[1] | Annotated[float, Field(ge=1, le=1)] | None = None
    mirostat: Literal[0] | None = None

    # Settings that do not change an answer.
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    penalize_newline: bool | None = None
    num_ctx: int | None = None
    num_keep: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    f16_kv: bool | None = None
    logits_all: bool | None = None
    vocab_only: bool | None = None
    embedding_only: bool | None = None

    def sampling(self) -> Fields:
        """Return our sampling fields."""
        # -1 and -2 stand for "no limit" and "fill the context".
        limit = self.num_predict if (self.num_predict or 0) > 0 else None
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "seed": None if self.seed == -1 else self.seed,  # -1: draw one
            "stop": self.stop,
            "max_tokens": limit,
            "repeat_penalty": self.repeat_penalty,
            "repeat_last_n": self.repeat_last_n,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }


class OllamaCall(Body):
    """A call that the assistant made earlier."""

    class Function(Body):
        """Name and arguments of the called function."""

        name: ToolName
        arguments: dict[str, Any] = Field(default_factory=dict)
        description: str | None = None
        index: int | None = None

    function: Function
    id: ShortText | None = None
    type: Literal["function"] | None = None


def no_images(images: list[Any] | None) -> list[Any] | None:
    """Return a list of images, which must be empty.

    Raises:
        ValueError: it is not.
    """
    if images:
        raise ValueError("images are not supported, because the model reads text only")
    return images


NoImages = Annotated[list[Any] | None, AfterValidator(no_images)]


class OllamaMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: Several[OllamaCall] | None = None
    tool_name: ShortText | None = None
    tool_call_id: ShortText | None = None
    images: NoImages = None

    def message(self) -> ChatMessage:
        """Return the turn in our layout, which needs the id of a call and content."""
        calls = [
            ToolCall(
                id=call.id or f"call_{place}",
                function=CalledFunction(
                    name=call.function.name, arguments=json.dumps(call.function.arguments)
                ),
            )
            for place, call in enumerate(self.tool_calls or ())
        ]
        return ChatMessage(
            role=self.role,
            content=self.content or "",
            tool_calls=calls or None,
            tool_call_id=self.tool_call_id or ("" if self.role == "tool" else None),
        )


class OllamaBody(Body):
    """Fields of both routes that generate; `experts` is our extension."""

    model: ShortText
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options = Options()
    keep_alive: float | str | None = None
    think: Literal[False] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    experts: ExpertsField = ExpertsField()

    def response_format(self) -> ResponseFormat | None:
        """Return the wanted format in our layout."""
        if isinstance(self.format, dict):
            schema = JsonSchema(schema_=self.format)
            return ResponseFormat(type="json_schema", json_schema=schema).of_field("format")
        return ResponseFormat(type="json_object").of_field("format") if self.format else None


class OllamaChat(OllamaBody):
    """`POST /api/chat`."""

    messages: Several[OllamaMessage] = Field(default_factory=list, max_length=2048)
    tools: Annotated[Several[Tool], Field(max_length=128)] | None = None

    def chat(self) -> ChatRequest:
        """Return the request in our layout; an assistant's text at the end is continued."""
        messages = [message.message() for message in self.messages]
        return ChatRequest(
            model=base_name(self.model),
            messages=messages,
            tools=self.tools,
            response_format=self.response_format(),
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs if self.logprobs else None,
            experts=self.experts,
            continue_final_message=can_continue(messages) or None,
            **self.options.sampling(),
        )


class OllamaGenerate(OllamaBody):
    """`POST /api/generate`; `suffix` is what follows the answer, as in a file."""

    prompt: str = ""
    system: str | None = None
    images: NoImages = None
    raw: bool | None = None
    suffix: str | None = None
    template: Literal[""] | None = None
    context: Annotated[Several[int], Field(max_length=0)] | None = None

    def chat(self) -> ChatRequest:
        """Return the prompt as a conversation of one turn."""
        opening = [ChatMessage(role="system", content=self.system)] if self.system else []
        return ChatRequest(
            model=base_name(self.model),
            messages=[*opening, ChatMessage(role="user", content=self.prompt)],
            response_format=self.response_format(),
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs if self.logprobs else None,
            experts=self.experts,
            **self.options.sampling(),
        )

    def completion(self, limit: int) -> CompletionRequest:
        """Return the prompt as a text to continue, without the chat template.

        Args:
            limit: most tokens of the answer if the request sets no limit.
        """
        sampling = self.options.sampling()
        return CompletionRequest(
            model=base_name(self.model),
            prompt=self.prompt,
            suffix=self.suffix or None,
            response_format=self.response_format(),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            experts=self.experts,
            **{**sampling, "max_tokens": sampling["max_tokens"] or limit},
        )


class OllamaEmbed(Body):
    """`POST /api/embed`."""

    model: ShortText
    input: str | Annotated[Several[str], Field(max_length=2048)] = ""
    truncate: bool | None = None
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    options: Options = Options()
    keep_alive: float | str | None = None


class OlderEmbed(Body):
    """`POST /api/embeddings`."""

    model: ShortText
    prompt: str = ""
    options: Options = Options()
    keep_alive: float | str | None = None


class ShowRequest(Body):
    """`POST /api/show`; `name` is an older name of `model`."""

    model: ShortText | None = None
    name: ShortText | None = None
    verbose: bool | None = None

    @property
    def wanted(self) -> str:
        """The model's name.

        Raises:
            ApiError: there is none.
        """
        found = self.model or self.name
        if not found:
            raise ApiError(400, "The field model is missing; send it.", param="model")
        return found


class AnswerLines:
    """The lines of one answer: a piece of text each, then the counts.

    Args:
        model: the model's name in the request.
        chunks: the answer, not started.
        layout: field that holds the text: "message" in a chat, "response" of a prompt.
        started: when the request came, by `time.perf_counter`.
    """

    def __init__(
        self,
        model: str,
        chunks: ChatChunks | CompletionChunks,
        layout: Literal["message", "response"],
        started: float,
    ) -> None:
        self._model = model
        self._chunks = chunks
        self._layout = layout
        self._started = started

    async def lines(self) -> AsyncIterator[Fields]:
        """Yield the lines of a stream."""
        first: float | None = None
        finish = "stop"
        async for choice in self._chunks.all_choices():
            delta = choice.get("delta", {"content": choice.get("text")})
            logprobs = entries(choice["logprobs"])
            said = delta.get("content") or delta.get("tool_calls") or logprobs
            if first is None and (said or choice["finish_reason"]):
                first = time.perf_counter()
            if said:
                content = self._content(delta.get("content") or "", delta.get("tool_calls", ()))
                scored = {"logprobs": logprobs} if logprobs else {}
                yield {**self._head(False), **content, **scored, "expert": choice["expert"]}
            finish = choice["finish_reason"] or finish
        done = {"done_reason": "length" if finish == "length" else "stop"}
        counts = self._counts(self._chunks.job.usage(), first or time.perf_counter())
        yield {**self._head(True), **self._content(""), **done, **counts}

    def fold(self, lines: list[Fields]) -> Fields:
        """Return the whole reply that the lines add up to."""
        if self._layout == "response":
            content = self._content("".join(line["response"] for line in lines))
        else:
            messages = [line["message"] for line in lines]
            content = self._content("".join(message["content"] for message in messages))
            calls = [call for message in messages for call in message.get("tool_calls", ())]
            content["message"] |= {"tool_calls": calls} if calls else {}
        logprobs = [entry for line in lines for entry in line.get("logprobs", ())]
        return {**lines[-1], **content, **({"logprobs": logprobs} if logprobs else {})}

    def _head(self, done: bool) -> Fields:
        return {"model": self._model, "created_at": now(), "done": done}

    def _content(self, text: str, calls: Sequence[Fields] = ()) -> Fields:
        if self._layout == "response":
            return {"response": text}
        functions = [
            {
                "function": {
                    "name": call["function"]["name"],
                    "arguments": as_object(call["function"]["arguments"]),
                }
            }
            for call in calls
        ]
        called = {"tool_calls": functions} if functions else {}
        return {"message": {"role": "assistant", "content": text, **called}}

    def _counts(self, usage: TokenUsage, first: float) -> Fields:
        """Return token counts, and times in nanoseconds.

        Args:
            usage: tokens of the answer.
            first: when its first token came.
        """
        end = time.perf_counter()
        return {
            "total_duration": int((end - self._started) * NANOSECONDS),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": int((first - self._started) * NANOSECONDS),
            "eval_count": usage.completion_tokens,
            "eval_duration": int((end - first) * NANOSECONDS),
            "experts": spoken(usage.experts),
        }


def entries(logprobs: Fields | None) -> list[Fields]:
    """Return log probabilities as this API lists them: an entry a token.

    Args:
        logprobs: those of a choice, as chat completions list them or in columns as completions do;
            None: not asked for.
    """
    if logprobs is None:
        return []
    if "content" in logprobs:
        return list(logprobs["content"])
    columns = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
    return [
        {
            "token": token,
            "logprob": value,
            "top_logprobs": [{"token": text, "logprob": each} for text, each in top.items()],
        }
        for token, value, top in zip(*columns, strict=True)
    ]


def base_name(model: str) -> str:
    """Return a model's name without the tag that Ollama's clients add."""
    return model.removesuffix(OLLAMA_TAG)


def now() -> str:
    """Return the time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
