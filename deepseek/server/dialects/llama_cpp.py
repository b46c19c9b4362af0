"""llama.cpp's native API: request bodies, and the chunks of an answer."""

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field

from deepseek.engine.request import TokenUsage
from deepseek.server.body import (
    Body,
    Ids,
    Penalty,
    Several,
    ShortText,
    StopText,
    TokenId,
    TopK,
    TopP,
)
from deepseek.server.metrics import spoken
from deepseek.server.routes.completions import CompletionChunks
from deepseek.server.schema import (
    ChatMessage,
    CompletionRequest,
    ExpertsField,
    LlamaCppFields,
    TemplateVariables,
    Tool,
)
from deepseek.server.stream import Fields

RANDOM_SEEDS = (-1, 2**32 - 1)
"""Seeds with which llama.cpp draws one: what a client sends, and what the server tells."""


class NativeCompletion(LlamaCppFields):
    """`POST /completion`; `experts` is our extension."""

    prompt: str | Ids
    model: ShortText | None = None
    n_predict: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None
    stream: bool | None = None
    stop: Annotated[Several[StopText], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-1, lt=1 << 63)] | None = None
    ignore_eos: bool | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    experts: ExpertsField = ExpertsField()
    repeat_last_n: int | None = None
    """0 turns the penalties off; else they look at the whole text, whatever it says"""

    # Values that change nothing; any other value is refused.
    typical_p: Literal[1] | Annotated[float, Field(ge=1, le=1)] | None = None
    mirostat: Literal[0] | None = None
    dynatemp_range: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    dry_multiplier: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    xtc_probability: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    n_probs: Literal[0] | None = None

    def completion(self, model: str, limit: int) -> CompletionRequest:
        """Return the request in our layout.

        Args:
            model: the model to take if the request names none.
            limit: most tokens of the answer if the request sets no limit.
        """
        wanted = self.n_predict
        penalised = self.repeat_last_n != 0
        return CompletionRequest(
            model=self.model or model,
            prompt=self.prompt,
            max_tokens=limit if wanted is None or wanted < 0 else wanted,
            stop=self.stop,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty if penalised else None,
            presence_penalty=self.presence_penalty if penalised else None,
            frequency_penalty=self.frequency_penalty if penalised else None,
            seed=None if self.seed in RANDOM_SEEDS else self.seed,
            ignore_eos=self.ignore_eos,
            json_schema=self.json_schema,
            grammar=self.grammar,
            experts=self.experts,
        )


SETTINGS = NativeCompletion.model_fields.keys() - {"prompt"}
"""Fields that a reply repeats; the texts around a gap (`/infill`) are not among them."""


class TokenizeRequest(Body):
    """`POST /tokenize`: llama.cpp's `content`, or vLLM's `prompt` or `messages`."""

    content: str | None = None
    prompt: str | None = None
    messages: Annotated[Several[ChatMessage], Field(min_length=1, max_length=2048)] | None = None
    tools: Annotated[Several[Tool], Field(max_length=128)] | None = None
    model: ShortText | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_special: bool = False
    add_special_tokens: bool | None = None
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    tokens: Several[TokenId]
    model: ShortText | None = None


class TemplateRequest(Body):
    """`POST /apply-template`."""

    messages: Annotated[Several[ChatMessage], Field(min_length=1, max_length=2048)]
    tools: Annotated[Several[Tool], Field(max_length=128)] | None = None
    model: ShortText | None = None
    chat_template_kwargs: TemplateVariables | None = None


class NativeChunks:
    """The chunks of one answer: a piece of text each, then the counts.

    Args:
        body: the request.
        chunks: the answer, not started.
        started: when the request came, by `time.perf_counter`.
    """

    def __init__(self, body: NativeCompletion, chunks: CompletionChunks, started: float) -> None:
        self._body = body
        self._chunks = chunks
        self._started = started

    async def chunks(self) -> AsyncIterator[Fields]:
        """Yield the chunks of a stream."""
        first: float | None = None
        last: Fields = {"finish_reason": "stop", "stop_reason": None}
        async for choice in self.choices():
            first = first or time.perf_counter()
            last = choice
            if choice["text"]:
                yield {**self._head(False), "content": choice["text"], "expert": choice["expert"]}
        yield {**self._head(True), "content": "", **self._end(last, first or time.perf_counter())}

    async def choices(self) -> AsyncIterator[Fields]:
        """Yield the pieces of the text."""
        async for choice in self._chunks.all_choices():
            yield choice

    def fold(self, chunks: list[Fields]) -> Fields:
        """Return the whole reply that the chunks add up to."""
        return {**chunks[-1], "content": "".join(chunk["content"] for chunk in chunks)}

    def _head(self, stop: bool) -> Fields:
        usage = self._chunks.usage()
        return {
            "index": 0,
            "id_slot": 0,
            "stop": stop,
            "tokens": [],
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
        }

    def _end(self, last: Fields, first: float) -> Fields:
        """Return the fields of the last chunk.

        Args:
            last: the last choice.
            first: when the first token came.
        """
        usage = self._chunks.usage()
        reached = last["stop_reason"]
        kind = (
            "limit" if last["finish_reason"] == "length" else "eos" if reached is None else "word"
        )
        body = self._body
        return {
            "model": self._chunks.head["model"],
            "prompt": body.prompt if isinstance(body.prompt, str) else "",
            "generation_settings": body.model_dump(include=SETTINGS, exclude_none=True),
            "stop_type": kind,
            "stopping_word": reached or "",
            "truncated": False,
            "tokens_cached": usage.cached_tokens,
            "timings": timings(usage, self._started, first, time.perf_counter()),
            "experts": spoken(usage.experts),
        }


def timings(usage: TokenUsage, start: float, first: float, end: float) -> dict[str, float]:
    """Return llama.cpp's speeds of an answer.

    Args:
        usage: tokens of the answer.
        start: when the request came, in seconds.
        first: when its first token came.
        end: when its last token came.
    """
    prompt_seconds = max(first - start, 1e-9)
    answer_seconds = max(end - first, 1e-9)
    computed = usage.prompt_tokens - usage.cached_tokens
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": prompt_seconds * 1e3,
        "prompt_per_second": computed / prompt_seconds,
        "predicted_n": usage.completion_tokens,
        "predicted_ms": answer_seconds * 1e3,
        "predicted_per_second": usage.completion_tokens / answer_seconds,
    }
