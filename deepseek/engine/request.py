"""What is asked of the engine, and what it answers. All of it is plain data that threads and
servers may share.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from deepseek.engine.sampler import Sampling
from deepseek.errors import ConfigError, UserError

FinishReason = Literal["stop", "length", "cancelled", "error"]
GrammarKind = Literal["json_schema", "regex", "lark"]
MAX_LOGPROBS = 20


class QueueFullError(UserError):
    """Too many requests wait already.

    Attributes:
        retry_after: seconds, an estimate, after which it makes sense to ask again.
    """

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(
            f"{waiting} requests are waiting already; try again in {math.ceil(retry_after)} s."
        )
        self.retry_after = retry_after


class EngineStoppedError(UserError):
    """The engine is draining or closed and takes no more requests."""


@dataclass(frozen=True)
class ExpertChoice:
    """Which plugged experts may speak in one request.

    Attributes:
        arm: "auto" takes those that the engine has armed; else the names of plugged ones, () for
            the base alone.
        deny: names that must not speak, whatever `arm` says; they need not be plugged.
        max_experts: most experts that one token is given to; None takes the engine's limit.
    """

    arm: tuple[str, ...] | Literal["auto"] = "auto"
    deny: tuple[str, ...] = ()
    max_experts: int | None = None


@dataclass(frozen=True)
class Grammar:
    """What the text must look like: a JSON schema (as JSON text), a regular expression, or a Lark
    grammar.
    """

    kind: GrammarKind
    text: str


@dataclass(frozen=True)
class Request:
    """One text to go on from.

    Attributes:
        prompt_ids: its tokens, at least one.
        sampling: how the next ones are chosen, and how many at most.
        experts: which plugged experts may speak.
        user_ids: what the user says in a conversation, without the template: these tokens decide
            which experts "auto" admits. None: the prompt is a document to be continued, and any
            expert may that it does not rule out.
        stop: texts that end the generation; they are not part of it.
        stop_token_ids: tokens that end it, beside the model's own end tokens.
        ignore_end: go on past the model's end tokens; for measurements.
        logprobs: how many of the likeliest tokens to tell at each place (0: only the chosen one's
            log probability); None tells nothing.
        prompt_logprobs: tell the same of each prompt token.
        scored_from: first prompt token of which it is told; what comes before may come out of the
            prefix cache.
        grammar: what the text must look like; None leaves it free.

    Raises:
        ConfigError: the prompt is empty, `logprobs` or `scored_from` is out of range, or a stop
            text is empty.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling = Sampling()  # noqa: RUF009 - it is frozen
    experts: ExpertChoice = ExpertChoice()
    user_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    scored_from: int = 1
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ConfigError("The prompt has 0 tokens, but at least 1 is needed; give some text.")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ConfigError(
                f"logprobs={self.logprobs} is out of range; it must be between 0 and {MAX_LOGPROBS}."
            )
        if not 1 <= self.scored_from <= len(self.prompt_ids):
            raise ConfigError(
                f"scored_from={self.scored_from} is no place after the first prompt token."
            )
        if not all(self.stop):
            raise ConfigError("A stop text is empty; leave it out.")


@dataclass(frozen=True)
class TokenLogprob:
    """The natural-log probability of a token under the model's own distribution, before temperature
    and penalties.

    Attributes:
        top: the likeliest tokens at its place with theirs, likeliest first; as many as
            `Request.logprobs`.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """One generated token; the last event of a generation has a `finish_reason`.

    Attributes:
        token_id: its id. An end token has its event too, without text. None where nothing was
            generated: the last event of a generation that was cancelled or failed.
        text: what is added to the text. Empty while a character is incomplete or while the text may
            become a stop text; what is held back so comes with a later event. All events' texts
            joined are the answer.
        logprob: None unless the request asks for `logprobs`.
        expert: name of the expert that spoke, or None for the base alone.
        finish_reason: "stop" at an end token, a stop text or a finished grammar; "length" at a
            limit.
        error: one sentence, where the reason is "error".
    """

    token_id: int | None
    text: str = ""
    logprob: TokenLogprob | None = None
    expert: str | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True)
class TokenUsage:
    """What a generation has used so far.

    Attributes:
        cached_tokens: prompt tokens that came out of the prefix cache.
        completion_tokens: generated tokens, an end token included.
        experts: how many of these each expert spoke; None stands for the base alone.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    experts: Mapping[str | None, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing and has done since it started.

    Attributes:
        running, waiting: requests now.
        cache_bytes: the budget of keys and values; `reserved_bytes` of it belong to running
            requests, `prefix_bytes` to stored prefixes.
        prompt_tokens: of all requests admitted, of which `cached_tokens` came out of the prefix
            cache.
        finished: requests by finish reason.
        steps: forward passes.
        step_seconds: time spent in them and around them, waiting excluded.
    """

    running: int
    waiting: int
    cache_bytes: int
    reserved_bytes: int
    prefix_bytes: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finished: Mapping[str, int]
    steps: int
    step_seconds: float
