"""Reply models for the OpenAPI description.

The routes build their replies without these models; the fuzz test validates the replies against
them.
"""

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]
Described = dict[int | str, dict[str, Any]]

STREAMED: Described = {200: {"content": {"text/event-stream": {"schema": {"type": "object"}}}}}
"""OpenAPI description of the replies of a streaming route."""

STREAMED_LINES: Described = {
    200: {"content": {"application/x-ndjson": {"schema": {"type": "object"}}}}
}
"""The same for a route that streams lines of JSON."""


METRICS: Described = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
"""The same for the metrics."""


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI description of an application, with the key that its requests have.

    It is made once. A server without keys needs none, so that the key is optional.
    """
    description = app.openapi()
    schemes = description.setdefault("components", {}).setdefault("securitySchemes", {})
    schemes["key"] = {"type": "http", "scheme": "bearer"}
    description["security"] = [{"key": []}, {}]
    return description


def described(model: type[BaseModel], *, streamed: bool = False) -> Described:
    """Return the OpenAPI description of a route's reply.

    Args:
        model: the reply.
        streamed: whether the route can also stream server-sent events; default: False.
    """
    return {200: {"model": model, **(STREAMED[200] if streamed else {})}}


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Answer(BaseModel):
    """Fields of all answers; `experts` counts the tokens written by each expert.

    `retrieved` lists the passages in the prompt; it is absent if the request does not retrieve.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    experts: dict[str, int]
    retrieved: list[str] = []


class Choice(BaseModel):
    """Fields of all choices."""

    index: int
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class Message(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[Any]
    tool_calls: list[dict[str, Any]] = []


class ChatChoice(Choice):
    """One answer to a conversation."""

    message: Message


class ChatReply(Answer):
    """Reply of `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextChoice(Choice):
    """One continuation of a prompt."""

    text: str


class CompletionReply(Answer):
    """Reply of `/v1/completions`."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ResponseReply(BaseModel):
    """Reply of `/v1/responses`."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]
    experts: dict[str, int]


class MessageReply(BaseModel):
    """Reply of `/v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    stop_details: None
    container: None
    usage: dict[str, int | None]
    experts: dict[str, int]
    retrieved: list[str] = []


class TokenCountReply(BaseModel):
    """Reply of `/v1/messages/count_tokens`."""

    input_tokens: int


class Model(BaseModel):
    """A model name, with OpenAI's and Anthropic's fields."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    type: Literal["model"]
    display_name: str
    created_at: str


class Models(BaseModel):
    """All model names on one page."""

    object: Literal["list"]
    data: list[Model]
    has_more: Literal[False]
    first_id: str
    last_id: str


class Embedding(BaseModel):
    """A vector, in base64 if requested."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """Reply of `/v1/embeddings`."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: dict[str, int]
