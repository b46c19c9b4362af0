"""Requests and results of the engine: plain data that threads and servers can share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

from deepseek import checks
from deepseek.checks import Check
from deepseek.engine.sampler import Sampling
from deepseek.errors import ConfigError, UserError
from deepseek.model.experts.arming import Arming

FinishReason = Literal["stop", "length", "cancelled", "error"]
GrammarKind = Literal["json_schema", "regex", "lark", "gbnf"]
ArmChoice = tuple[str, ...] | Mapping[str, float] | Literal["auto"]
MAX_LOGPROBS = 20


class QueueFullError(UserError):
    """The queue is full.

    Attributes:
        waiting: number of requests that are running or waiting.
        retry_after: estimated number of seconds until a retry can succeed.
    """

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(
            f"{waiting} requests are running or waiting already; try again in "
            f"{math.ceil(retry_after)} s."
        )
        self.waiting = waiting
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type["QueueFullError"], tuple[int, float]]:
        # By default an exception is copied, or sent to another process, by its message alone.
        return type(self), (self.waiting, self.retry_after)


class EngineStoppedError(UserError):
    """The engine is draining or closed and takes no more requests."""


class GrammarCompilerError(UserError):
    """Grammars cannot be compiled here, whatever they are."""


@dataclass(frozen=True)
class ExpertChoice:
    """The plugged experts that may fire in one request.

    Attributes:
        arm: "auto" (default) selects those that the engine has armed; otherwise the names of
            plugged experts, () for the base alone. A mapping of names to weights scales what an
            expert or adapter adds by a factor above 0 and at most 2. "auto" may be among the names.
        deny: names of experts that must not fire, even if `arm` selects them; they need not be
            plugged.
        max_experts: maximum number of experts at one token; None (default) selects the engine's
            limit.

    Raises:
        ConfigError: a weight is out of range.
    """

    arm: ArmChoice = "auto"
    deny: tuple[str, ...] = ()
    max_experts: int | None = None

    def __post_init__(self) -> None:
        Arming.parse(self.arm)
        object.__setattr__(self, "deny", tuple(checks.texts("deny", self.deny)))
        checks.optional(partial(checks.whole, least=1))("max_experts", self.max_experts)


@dataclass(frozen=True)
class Grammar:
    """A constraint on the generated text.

    Attributes:
        kind: "json_schema", "regex", "lark" or "gbnf" (llama.cpp's grammars).
        text: the schema as JSON text, the regular expression, or the grammar.
    """

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        checks.choice("grammar.kind", self.kind, get_args(GrammarKind))
        checks.text("grammar.text", self.text)


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt_ids: tokens of the prompt, at least one.
        sampling: how tokens are chosen, and how many at most.
        experts: the plugged experts that may fire.
        user_ids: the user's words in a conversation, without the chat template; with "auto", these
            tokens decide which experts are admitted. None: the prompt is a document to continue,
            and it admits every expert that it does not rule out.
        document_ids: the part of a document that decides this, such as a prompt without the
            passages retrieved for it; None: the whole prompt.
        stop: strings that end the generation; they are not part of the text.
        stop_token_ids: tokens that end the generation, in addition to the model's end tokens.
        ignore_end: continue past the model's end tokens; for benchmarks.
        logprobs: number of likeliest tokens to report at each position, at most 20; 0 reports only
            the log probability of the chosen token, None reports nothing.
        prompt_logprobs: report the same for each prompt token.
        scored_from: index of the first prompt token to report; the tokens before it may come from
            the prefix cache. Default 1, since nothing predicts token 0.
        grammar: constraint on the generated text; None leaves it free.
        heal: sample the prompt's last tokens again, up to the beginning of their word or white
            space, among all that begin with their text, which is left out of the reply (token
            healing). A prompt that ends within a word or within white space then continues as it
            would in a text that is tokenised as a whole. The tokens sampled in their place count
            as part of the prompt, not of the reply.

    Raises:
        ConfigError: the prompt is empty, a field has a wrong type or is out of range, a stop text
            is empty, or `heal` is combined with `grammar` or `prompt_logprobs`.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling = Sampling()  # noqa: RUF009 - it is frozen
    experts: ExpertChoice = ExpertChoice()
    user_ids: tuple[int, ...] | None = None
    document_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    scored_from: int = 1
    grammar: Grammar | None = None
    heal: bool = False

    def __post_init__(self) -> None:
        checks.apply(REQUEST, self)
        tokens = len(self.prompt_ids)
        checks.whole("scored_from", self.scored_from, least=1, most=tokens)
        if not all(self.stop):
            raise ConfigError("A stop text is empty; leave it out.")
        if self.heal and (self.grammar is not None or self.prompt_logprobs):
            raise ConfigError(
                "heal goes together with neither grammar nor prompt_logprobs; leave it or them out."
            )


def _as_tuple(check: Check) -> Check:
    return lambda name, value: tuple(check(name, value))


REQUEST: dict[str, Check] = {
    "prompt_ids": _as_tuple(checks.prompt),
    "sampling": partial(checks.instance, kind=Sampling),
    "experts": partial(checks.instance, kind=ExpertChoice),
    "grammar": checks.optional(partial(checks.instance, kind=Grammar)),
    "user_ids": checks.optional(_as_tuple(checks.token_ids)),
    "document_ids": checks.optional(_as_tuple(checks.token_ids)),
    "stop": _as_tuple(checks.texts),
    "stop_token_ids": _as_tuple(checks.token_ids),
    "ignore_end": checks.flag,
    "logprobs": checks.optional(partial(checks.whole, least=0, most=MAX_LOGPROBS)),
    "prompt_logprobs": checks.flag,
    "heal": checks.flag,
}
"""Type and range of each field of `Request` but `scored_from`."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token under the model's own distribution, before temperature and
    penalties.

    Attributes:
        token_id: the token.
        logprob: its natural-log probability.
        top: the likeliest tokens at its position with their log probabilities, likeliest first;
            `Request.logprobs` of them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """One generated token; the last event of a generation has a `finish_reason`.

    Attributes:
        token_id: the token. An end token has an event too, without text. None in the last event of
            a generation that was cancelled or failed, since no token was generated.
        text: text to append. It is empty while a character is incomplete or while the text may be
            the start of a stop text; a later event then delivers what was held back. The answer is
            the concatenation of all events' texts.
        logprob: None unless the request asks for `logprobs`.
        expert: name of the expert with the largest weight at this token, or of an armed adapter if
            no expert fired; None: the base alone.
        finish_reason: "stop" after an end token, a stop text or a completed grammar; "length" at a
            token limit; "cancelled"; "error".
        error: one sentence on the failure, if the reason is "error".
        refused: whether the request caused the failure, such as by a grammar that turned out to be
            too complex.
        stop_text: the stop text that ended the generation, None if something else did.
        held: number of characters that are held back after this token.
    """

    token_id: int | None
    text: str = ""
    logprob: TokenLogprob | None = None
    expert: str | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    refused: bool = False
    stop_text: str | None = None
    held: int = 0


@dataclass(frozen=True)
class TokenUsage:
    """Tokens that a generation has used so far.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: prompt tokens that came from the prefix cache.
        completion_tokens: generated tokens, including the end token, without those in place of the
            prompt's last ones (`Request.heal`).
        experts: number of generated tokens by expert; None counts those of the base alone.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    experts: Mapping[str | None, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineStats:
    """Current load of an engine, and its counters since it started.

    Attributes:
        running, waiting: current number of requests.
        cache_bytes: key/value budget in bytes.
        reserved_bytes: part of the budget that is reserved for running requests.
        prefix_bytes: part of the budget that the prefix cache occupies.
        prompt_tokens: computed or cached prompt tokens of all admitted requests.
        cached_tokens: those of them that came from the prefix cache, with all their layers.
        shared_tokens: those of them whose lower layers came from the prefix cache, and whose upper
            layers were computed for other experts.
        completion_tokens: sampled tokens, also those in place of a prompt's last one.
        finished: number of requests by finish reason.
        steps: number of forward passes.
        step_seconds: time spent in steps, without the time spent waiting for requests.
        expert_bytes: memory of the experts' weights under their budget.
        expert_loads: number of times that such weights were read.
    """

    running: int
    waiting: int
    cache_bytes: int
    reserved_bytes: int
    prefix_bytes: int
    prompt_tokens: int
    cached_tokens: int
    shared_tokens: int
    completion_tokens: int
    finished: Mapping[str, int]
    steps: int
    step_seconds: float
    expert_bytes: int
    expert_loads: int
