"""Turn a job's events into OpenAI's chunks, streamed as server-sent events or folded into one JSON
object.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from secrets import token_hex
from typing import Any, Literal

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deepseek.engine.request import TokenEvent, TokenLogprob, TokenUsage
from deepseek.server.admission import Job
from deepseek.server.encoding import encoded, encoded_aside, is_large
from deepseek.server.errors import as_api_error, body_for
from deepseek.server.job import GenerationJob
from deepseek.server.metrics import spoken
from deepseek.server.schema import GenerationFields
from deepseek.server.service import Service
from deepseek.server.token_text import TokenReader

LEAST_LOGPROB = -9999.0
"""Sent in place of minus infinity, which JSON cannot represent."""

Fields = dict[str, Any]


Layout = Literal["events", "named events", "unterminated", "lines"]
"""How chunks are streamed: as OpenAI's server-sent events with `[DONE]` at the end, as named events
(the name is their `type`), as events without `[DONE]`, or as lines of JSON.
"""


class Reply(StreamingResponse):
    """Send chunks as server-sent events or folded into one JSON object; always close the job.

    The status is sent with the first bytes, so that an error before them still becomes an error
    reply. If the client disconnects, Starlette stops the iteration and the job is closed.

    Args:
        chunks: the chunks to send.
        job: the job to close at the end; default: none.
        layout: how chunks are streamed; default: "events".
        fold: makes one JSON object of all chunks; default: stream the chunks.
    """

    def __init__(
        self,
        chunks: AsyncIterator[Fields],
        *,
        job: Job | None = None,
        layout: Layout = "events",
        fold: Callable[[list[Fields]], Fields] | None = None,
    ) -> None:
        self._path = ""
        lines = self._lines(chunks, layout) if fold is None else self._folded(chunks, fold)
        streamed = "application/x-ndjson" if layout == "lines" else "text/event-stream"
        kind = streamed if fold is None else "application/json"
        super().__init__(
            lines, media_type=kind, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._job = job

    async def stream_response(self, send: Send) -> None:
        """Send the status once the first chunk is there."""
        body = aiter(self.body_iterator)
        first = await anext(body)

        async def lines() -> AsyncIterator[Any]:
            yield first
            async for line in body:
                yield line

        self.body_iterator = lines()
        await super().stream_response(send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._path = scope["path"]
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._job is not None:
                self._job.close()
                scope.setdefault("state", {})["usage"] = self._job.usage()

    async def _folded(
        self, chunks: AsyncIterator[Fields], fold: Callable[[list[Fields]], Fields]
    ) -> AsyncIterator[bytes]:
        sent = [chunk async for chunk in chunks]
        yield await encoded_aside(partial(fold, sent))

    async def _lines(self, chunks: AsyncIterator[Fields], layout: Layout) -> AsyncIterator[bytes]:
        begun = False
        try:
            async for chunk in chunks:
                yield await _line(chunk, layout, chunk.get("type"))
                begun = True
        except Exception as error:
            if not begun:
                raise
            # The status is already sent, so the error becomes an event.
            yield await _line(body_for(as_api_error(error), self._path), layout, "error")
        if layout == "events":
            yield b"data: [DONE]\n\n"


async def _line(chunk: Fields, layout: Layout, name: str | None) -> bytes:
    data = await encoded_aside(lambda: chunk) if is_large(chunk) else encoded(chunk)
    if layout == "lines":
        return data + b"\n"
    head = f"event: {name}\n".encode() if layout == "named events" else b""
    return head + b"data: " + data + b"\n\n"


class Chunks(ABC):
    """Chunks of chat and plain completions: one per choice and token, then the usage.

    Args:
        service: the server's state.
        body: the request.
        job: the running generations.
        kind: `object` field of a whole reply.
        prefix: prefix of the reply's id.
        suffix: appended to `kind` for the `object` field of a chunk.
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
            "model": body.model or service.settings.model,
            "system_fingerprint": service.fingerprint,
        }
        self.kind = kind
        self.suffix = suffix
        # Sources of the retrieved passages, None if the request does not retrieve.
        self.retrieved: list[str] | None = None

    @abstractmethod
    def choices(self, index: int, event: TokenEvent) -> Iterator[Fields]:
        """Yield the parts that one more token adds to the choice with this index."""

    def opening(self) -> Iterator[Fields]:
        """Yield the first chunks of the choices, before any token; default: none."""
        yield from ()

    def usage(self) -> TokenUsage:
        """Return the tokens used so far."""
        return self.job.usage()

    def used(self) -> Fields:
        """Return the usage, and our fields (see `own_fields`)."""
        return {"usage": usage_fields(self.usage()), **self.own_fields()}

    def own_fields(self) -> Fields:
        """Return the number of tokens per expert, and the sources of retrieved passages."""
        retrieved = {} if self.retrieved is None else {"retrieved": self.retrieved}
        return {"experts": spoken(self.usage().experts), **retrieved}

    async def chunks(self) -> AsyncIterator[Fields]:
        """Yield the chunks of a stream."""
        head = {**self.head, "object": self.kind + self.suffix}
        usage = {"usage": None} if self.wants_usage else {}
        async for choice in self.all_choices():
            yield {**head, "choices": [choice], **usage}
        if self.wants_usage:
            yield {**head, "choices": [], **self.used()}

    def fold(self, chunks: list[Fields]) -> Fields:
        """Return the whole reply that the chunks add up to."""
        choices: dict[int, list[Fields]] = {}
        for chunk in chunks:
            for choice in chunk["choices"]:
                choices.setdefault(choice["index"], []).append({**choice, "expert": None})
        whole = [self.finished(joined(choices[index])) for index in sorted(choices)]
        return {**self.head, "object": self.kind, "choices": whole, **self.used()}

    def finished(self, choice: Fields) -> Fields:
        """Return a folded choice in the layout of a whole reply."""
        return {name: value for name, value in choice.items() if name != "expert"}

    async def all_choices(self) -> AsyncIterator[Fields]:
        """Yield the parts that each token adds to its choice, in order of arrival."""
        for choice in self.opening():
            yield choice
        async for index, event in self.job.events():
            for choice in self.choices(index, event):
                yield choice
                await asyncio.sleep(0)  # `choices` may yield many pieces: an echoed prompt's scores


def joined(pieces: Sequence[Any]) -> Any:
    """Return the pieces of a streamed value joined, in time proportional to their size: texts and
    lists are concatenated, dicts are joined field by field, of anything else the last one counts.

    Args:
        pieces: the pieces; None stands for nothing.
    """
    present = [piece for piece in pieces if piece is not None]
    if not present:
        return None
    match present[0]:
        case dict():
            names = dict.fromkeys(chain.from_iterable(present))
            return {name: joined([piece.get(name) for piece in present]) for name in names}
        case str():
            return "".join(present)
        case list():
            return list(chain.from_iterable(present))
        case _:
            return present[-1]


def usage_fields(usage: TokenUsage) -> Fields:
    """Return the usage with OpenAI's field names."""
    total = usage.prompt_tokens + usage.completion_tokens
    counts = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": total,
    }
    return {**counts, "prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}


def chat_logprobs(reader: TokenReader, token: TokenLogprob) -> Fields:
    """Return log probabilities in chat's layout: of a token and its most likely alternatives.

    Args:
        reader: reads the tokens of the answer.
        token: the next one.
    """
    read = reader.at(token.token_id)

    def entry(identity: int, logprob: float) -> Fields:
        text, content = read(identity)
        return {
            "token": text,
            "logprob": finite(logprob),
            "bytes": None if content is None else list(content),
        }

    alternatives = [entry(*top) for top in token.top]
    content = [{**entry(token.token_id, token.logprob), "top_logprobs": alternatives}]
    return {"content": content, "refusal": None}


def finite(logprob: float) -> float:
    """Return a log probability that JSON can represent."""
    return max(logprob, LEAST_LOGPROB)
