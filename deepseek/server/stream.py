"""From a job's events to what is sent: OpenAI's chunks, as server-sent events or folded into one
JSON object.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from secrets import token_hex
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deepseek.engine.request import TokenEvent, TokenLogprob, TokenUsage
from deepseek.server.errors import as_api_error
from deepseek.server.metrics import spoken
from deepseek.server.schema import GenerationFields
from deepseek.server.service import GenerationJob, Service

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""

Fields = dict[str, Any]


class Reply(StreamingResponse):
    """Sends chunks as server-sent events, or what `fold` makes of all of them; closes the job
    whatever happens.

    The status is sent with the first bytes, so that what goes wrong before is still an error reply.
    If the client goes away, the job ends (Starlette stops the iteration).

    Args:
        named: events have names (their `type`), and no `[DONE]` follows.
    """

    def __init__(
        self,
        chunks: AsyncIterator[Fields],
        *,
        job: GenerationJob | None = None,
        named: bool = False,
        fold: Callable[[list[Fields]], Fields] | None = None,
    ) -> None:
        lines = self._lines(chunks, named) if fold is None else self._folded(chunks, fold)
        kind = "text/event-stream" if fold is None else "application/json"
        super().__init__(
            lines, media_type=kind, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._job = job

    async def stream_response(self, send: Send) -> None:
        """Send the status once there is something to say."""
        body = aiter(self.body_iterator)
        first = await anext(body)

        async def lines() -> AsyncIterator[Any]:
            yield first
            async for line in body:
                yield line

        self.body_iterator = lines()
        await super().stream_response(send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._job is not None:
                self._job.close()

    async def _folded(
        self, chunks: AsyncIterator[Fields], fold: Callable[[list[Fields]], Fields]
    ) -> AsyncIterator[str]:
        yield json.dumps(fold([chunk async for chunk in chunks]), ensure_ascii=False)

    async def _lines(self, chunks: AsyncIterator[Fields], named: bool) -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield (f"event: {chunk['type']}\n" if named else "") + _data(chunk)
        except Exception as error:  # the status is sent already, so the error comes as an event
            yield ("event: error\n" if named else "") + _data(as_api_error(error).body())
        if not named:
            yield "data: [DONE]\n\n"


def _data(chunk: Fields) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Chunks(ABC):
    """What chat and plain completions have in common: one chunk a choice and token, and the usage
    at the end.

    Args:
        kind: OpenAI's name of the whole reply; `suffix` makes that of a chunk.
        prefix: of ids.
    """

    def __init__(
        self,
        service: Service,
        body: GenerationFields,
        job: GenerationJob,
        kind: str,
        prefix: str,
        suffix: str,
    ) -> None:
        self.service = service
        self.job = job
        self.wants_usage = body.stream_options is not None and body.stream_options.include_usage
        self.head = {
            "id": f"{prefix}-{token_hex(12)}",
            "created": int(time.time()),
            "model": body.model,
        }
        self.kind = kind
        self.suffix = suffix
        self.retrieved: list[str] | None = (
            None  # where passages in the prompt come from, if any were asked for
        )

    @abstractmethod
    def choices(self, index: int, event: TokenEvent) -> Iterator[Fields]:
        """Yield what one more token adds to a choice."""

    def opening(self) -> Iterator[Fields]:
        """Yield what choices begin with, before any token."""
        yield from ()

    def used(self) -> Fields:
        """Return the usage, how many tokens each expert spoke, and where retrieved passages come
        from.
        """
        usage = self.job.usage()
        retrieved = {} if self.retrieved is None else {"retrieved": self.retrieved}
        return {"usage": usage_fields(usage), "experts": spoken(usage.experts), **retrieved}

    async def chunks(self) -> AsyncIterator[Fields]:
        """Yield the chunks of a stream."""
        head = {**self.head, "object": self.kind + self.suffix}
        usage = {"usage": None} if self.wants_usage else {}
        async for choice in self._all_choices():
            yield {**head, "choices": [choice], **usage}
        if self.wants_usage:
            yield {**head, "choices": [], **self.used()}

    def fold(self, chunks: list[Fields]) -> Fields:
        """Return the one reply that all chunks together are."""
        choices: dict[int, Fields] = {}
        for chunk in chunks:
            for choice in chunk["choices"]:
                choices[choice["index"]] = joined(
                    choices.get(choice["index"]), {**choice, "expert": None}
                )
        whole = [self.finished(choices[index]) for index in sorted(choices)]
        return {**self.head, "object": self.kind, "choices": whole, **self.used()}

    def finished(self, choice: Fields) -> Fields:
        """Return a folded choice in the form of a whole reply."""
        return {name: value for name, value in choice.items() if name != "expert"}

    async def _all_choices(self) -> AsyncIterator[Fields]:
        for choice in self.opening():
            yield choice
        async for index, event in self.job.events():
            for choice in self.choices(index, event):
                yield choice


def joined(before: Any, more: Any) -> Any:
    """Return what two pieces of a streamed value make together: texts and lists go on, tables field
    by field.
    """
    if isinstance(before, dict) and isinstance(more, dict):
        return {name: joined(before.get(name), more.get(name)) for name in {**before, **more}}
    if isinstance(before, str | list) and isinstance(more, str | list):
        return before + more  # type: ignore[operator]
    return before if more is None else more


def usage_fields(usage: TokenUsage) -> Fields:
    """Return `usage` as OpenAI names it."""
    total = usage.prompt_tokens + usage.completion_tokens
    counts = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": total,
    }
    return {**counts, "prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}


def chat_logprobs(service: Service, logprobs: Sequence[TokenLogprob]) -> Fields:
    """Return tokens with their log probabilities and those of the likeliest, as chat tells them."""

    def told(identity: int, logprob: float) -> Fields:
        text = service.token_text(identity)
        whole = "\ufffd" not in text  # a token may be a part of a character
        return {
            "token": text,
            "logprob": finite(logprob),
            "bytes": list(text.encode()) if whole else None,
        }

    return {
        "content": [
            {**told(one.token_id, one.logprob), "top_logprobs": [told(*top) for top in one.top]}
            for one in logprobs
        ],
        "refusal": None,
    }


def finite(logprob: float) -> float:
    """Return a log probability that JSON can say."""
    return max(logprob, LEAST_LOGPROB)
