"""What clients get, for the OpenAPI description: the replies of the routes that generate, and of
those that list.

The routes build their replies by themselves; the fuzz test holds them against these.
"""

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]
Described = dict[int | str, dict[str, Any]]

STREAMED: Described = {200: {"content": {"text/event-stream": {"schema": {"type": "object"}}}}}
"""What a route that streams says of its replies in the OpenAPI description."""


def described(model: type[BaseModel], *, streamed: bool = False) -> Described:
    """Return what a route says of its reply, which may come as events too."""
    return {200: {"model": model, **(STREAMED[200] if streamed else {})}}


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Answer(BaseModel):
    """What all answers share; `experts` tells how many tokens each expert spoke.

    `retrieved` tells which passages stand in the prompt; it is absent where none were asked for.
    """

    id: str
    created: int
    model: str
    usage: Usage
    experts: dict[str, int]
    retrieved: list[str] = []


class Choice(BaseModel):
    """What all choices share."""

    index: int
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class Message(BaseModel):
    """What the assistant said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[dict[str, Any]] = []


class ChatChoice(Choice):
    """One answer to a conversation."""

    message: Message


class ChatReply(Answer):
    """Of `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextChoice(Choice):
    """One text that goes on."""

    text: str


class CompletionReply(Answer):
    """Of `/v1/completions`."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ResponseReply(BaseModel):
    """Of `/v1/responses`."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]
    experts: dict[str, int]


class Model(BaseModel):
    """A model name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    """All model names."""

    object: Literal["list"]
    data: list[Model]


class Embedding(BaseModel):
    """A vector, in base64 if that was asked for."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """Of `/v1/embeddings`."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: dict[str, int]
