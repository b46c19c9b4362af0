"""llama.cpp's native API: request bodies, and the chunks of an answer."""

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from deepseek.engine.request import TokenUsage
from deepseek.server.body import (
    BiasKey,
    Body,
    Ids,
    Penalty,
    RetrieveField,
    Several,
    ShortText,
    StopText,
    TokenId,
    TopK,
    TopP,
)
from deepseek.server.dialects.block_text import BlockText
from deepseek.server.dialects.llama_cpp_fields import LlamaCppFields, Milliseconds
from deepseek.server.routes.completions import CompletionChunks
from deepseek.server.schema import (
    ChatMessage,
    CompletionRequest,
    ExpertsField,
    TemplateVariables,
    Tool,
)
from deepseek.server.stream import Fields

RANDOM_SEEDS = (-1, 2**32 - 1)
"""Seeds with which llama.cpp draws one: what a client sends, and what the server tells."""


NEVER = -100.0
"""Bias by which OpenAI's clients rule a token out; llama.cpp's send false."""


def one_prompt(prompt: Any) -> Any:
    """Return an unvalidated prompt, also if it is the only one in a list.

    Raises:
        ValueError: there are several prompts, or one of tokens and texts.
    """
    if not isinstance(prompt, list) or not any(isinstance(part, str | list) for part in prompt):
        return prompt
    if len(prompt) > 1:
        raise ValueError("it should be one prompt, which is a text or a list of tokens")
    return prompt[0]


def bias_by_token(bias: Any) -> Any:
    """Return an unvalidated `logit_bias` as an object of numbers.

    Args:
        bias: the object, or as llama.cpp's clients send it: a list of pairs of a token and its
            bias, or false in place of a number.

    Raises:
        ValueError: the list holds something else than pairs with the id of a token.
    """
    if isinstance(bias, list):
        for pair in bias:
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int:
                raise ValueError("it should be pairs of the id of a token and its bias")
        bias = {str(token): value for token, value in bias}
    if not isinstance(bias, dict):
        return bias
    return {token: NEVER if value is False else value for token, value in bias.items()}


class NativeCompletion(LlamaCppFields):
    """`POST /completion`; `experts` and `retrieve` are our extensions.

    Without `n_predict`, or with -1, an answer ends after `Settings.answer_tokens` tokens.
    """

    prompt: Annotated[str | Ids, BeforeValidator(one_prompt)]
    model: ShortText | None = None
    stream: bool | None = None
    stop: StopText | Annotated[Several[StopText], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[BiasKey, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(bias_by_token)
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-1, lt=1 << 63)] | None = None
    ignore_eos: bool | None = None
    n_indent: Annotated[int, Field(ge=0, le=1 << 16)] | None = None
    t_max_predict_ms: Milliseconds | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    experts: ExpertsField = ExpertsField()
    retrieve: RetrieveField | None = None

    def completion(self, model: str, limit: int) -> CompletionRequest:
        """Return the request in our layout.

        Args:
            model: the model to take if the request names none.
            limit: most tokens of the answer if the request sets no limit.
        """
        wanted = self.n_predict
        return CompletionRequest(
            model=self.model or model,
            prompt=self.prompt,
            max_tokens=limit if wanted is None or wanted < 0 else wanted,
            stop=self.stop,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            repeat_last_n=self.repeat_last_n,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=None if self.seed in RANDOM_SEEDS else self.seed,
            ignore_eos=self.ignore_eos,
            json_schema=self.json_schema,
            grammar=self.grammar,
            experts=self.experts,
            retrieve=self.retrieve,
        )


SETTINGS = NativeCompletion.model_fields.keys() - {"prompt", "response_fields"}
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

    The answer ends before a line that leaves its block, or when time is up, if the request says so.

    Args:
        body: the request.
        chunks: the answer, not started.
        started: when the request came, by `time.perf_counter`.
    """

    def __init__(self, body: NativeCompletion, chunks: CompletionChunks, started: float) -> None:
        self._body = body
        self._chunks = chunks
        self._started = started
        limit = body.t_max_predict_ms
        seconds = limit / 1000 if limit is not None and limit > 0 else float("inf")
        self._text = BlockText(body.n_indent or 0, seconds)
        self._fields = body.response_fields

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
        """Yield the pieces of the text up to its end.

        As in llama.cpp, `n_indent` ends the text before a line with less white space at its
        beginning, and `t_max_predict_ms` ends it at the end of a line.
        """
        first: float | None = None
        async for choice in self._chunks.all_choices():
            now = time.perf_counter()
            first = now if first is None else first
            text = self._text.take(choice["text"], now - first)
            if self._text.finish is not None:
                yield {**choice, "text": text, "finish_reason": self._text.finish}
                return
            if choice["finish_reason"] is not None:
                text += self._text.rest()
            yield {**choice, "text": text}

    def fold(self, chunks: list[Fields]) -> Fields:
        """Return the whole reply that the chunks add up to, or those of its fields that the
        request names.

        A slash in a name leads into a field; the reply has it under the whole name. No names ask
        for all fields.
        """
        reply = {**chunks[-1], "content": "".join(chunk["content"] for chunk in chunks)}
        if not self._fields:
            return reply
        values = ((path, value_at(reply, path)) for path in self._fields)
        return {path: value for path, value in values if value is not None}

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
            **self._chunks.own_fields(),
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


def value_at(fields: object, path: str) -> object:
    """Return the value at a path of names, such as "timings/prompt_n"; None if there is none."""
    for name in path.split("/"):
        fields = fields.get(name) if isinstance(fields, dict) else None
    return fields
