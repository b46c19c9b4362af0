"""A running request: its state, which changes with every step.

Decoding is speculative, by prompt lookup: the next tokens are guessed from what followed the same
tokens earlier in the text. Decoding is bound by reading the weights, so a step costs about the same
for one token as for a few, and accepted guesses are nearly free. Rejected guesses change nothing:
each token is chosen as it would be without them (speculative decoding without a draft model:
arXiv:2302.01318, arXiv:2304.04487).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from deepseek.engine.prefix import part_keys
from deepseek.engine.request import FinishReason, Request, TokenEvent, TokenLogprob, TokenUsage
from deepseek.engine.sampler import Logits, Sampler
from deepseek.engine.vocabulary import Opening, TextStream, Vocabulary
from deepseek.errors import ConfigError, UserError
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.module import ExpertModule
from deepseek.model.experts.state import ExpertBytes
from deepseek.model.experts.weight_cache import Sizes
from deepseek.model.language_model import LanguageModel, context_length
from deepseek.model.layer_parts import LayerPart, choose_cuts, layer_parts
from deepseek.runner import Chunk, Rewindable, SequenceState

NO_OPENING = Opening()

WORDS = 2  # tokens that must match for a guess


class Lookup:
    """The tokens of one text, indexed by pairs of tokens, for guessing the next ones.

    Args:
        ids: tokens of the text so far.

    Attributes:
        guesses: the latest guesses, which have not been verified.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._limit = 1
        self.guesses: list[int] = []
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token to the text."""
        self._after[tuple(self._ids[-WORDS:])] = len(self._ids)
        self._ids.append(token)

    def guess(self, most: int) -> list[int]:
        """Return at most `most` tokens that followed the latest earlier occurrence of the last two
        tokens.
        """
        start = self._after.get(tuple(self._ids[-WORDS:]), len(self._ids))
        self.guesses = self._ids[start : start + max(0, min(most, self._limit))]
        return self.guesses

    def judge(self, right: int) -> None:
        """Adapt the number of guesses to how many of the last ones were accepted.

        Args:
            right: number of accepted guesses; the next step guesses up to one more than twice as
                many.
        """
        if self.guesses:
            self._limit = 1 + 2 * right
            self.guesses = []


class ActiveSequence:
    """A running request: prefills its prompt chunk by chunk, then decodes until it finishes.

    Args:
        request: the prompt and its options.
        armed: experts for the whole request; None for the base alone.
        vocabulary: the model's tokens.
        capacity: maximum number of tokens, including the prompt.
        block: tokens in a prefill chunk and in a block of the prefix cache.
        parts: the parts of the layers whose keys and values are cached separately.
        expert_bytes: memory for each expert whose weights are read when they are needed.
        opening: the end of the prompt, if that is sampled again instead of being part of `request`:
            the generated text must begin with its text, which is left out of the reply; default:
            none.

    Attributes:
        expert_bytes: as passed.
        cuts: layers at which the sequence's state is divided into these parts.
        keys: cache keys of the prompt, for each part of the layers.
        state: the runner's state of the sequence; None before its admission and after its end.
        begun: whether its computation has begun.
        cancelled: set by any thread to end the sequence before the next step.
        finish_reason: None while the sequence runs.
        deliver: consumer of the events; the scheduler calls it with each one.
        prompt_logprobs: log probabilities of the prompt tokens computed so far.
        cached_tokens: prompt tokens that came from the prefix cache, with all their layers.
        stream_bytes: memory of residual streams from the prefix cache, in bytes.

    Raises:
        ConfigError: the request's grammar does not compile.
    """

    def __init__(
        self,
        request: Request,
        armed: ArmedExperts | None,
        vocabulary: Vocabulary,
        capacity: int,
        block: int,
        parts: Sequence[LayerPart],
        expert_bytes: Sizes[ExpertModule],
        opening: Opening = NO_OPENING,
    ) -> None:
        self.request = request
        self.expert_bytes = expert_bytes
        self.armed = armed
        self.capacity = capacity
        self.block = block
        self.cuts = tuple(part.cut for part in parts if part.cut is not None)
        prompt = request.prompt_ids
        first_needed = request.scored_from if request.prompt_logprobs else len(prompt)
        self.keys = part_keys(parts, armed, prompt, block, first_needed)
        self.state: SequenceState | None = None
        self.begun = False
        self.cancelled = False
        self.finish_reason: FinishReason | None = None
        self.deliver: Callable[[TokenEvent], None] = lambda _: None
        unscored = request.scored_from if request.prompt_logprobs else 0
        self.prompt_logprobs: list[TokenLogprob | None] = [None] * unscored
        self.cached_tokens = 0
        self.stream_bytes = 0
        self._prompt_tokens = len(prompt) + opening.tokens
        self._opening_tokens = 0
        self._opening_bytes = len(opening.text.encode())  # that have not been sampled yet
        self._expert_counts = Counter[str | None]()
        self._sampler = Sampler(request.sampling, request.prompt_ids)
        self._text = TextStream(vocabulary.tokenizer, request.stop, len(opening.text))
        self._matcher = None
        self._token_bytes = vocabulary.token_bytes
        if opening.tokens:
            self._matcher = vocabulary.begins_with(opening.text)
        elif request.grammar is not None:
            self._matcher = vocabulary.matcher(request.grammar)
        self._ends = {*request.stop_token_ids, *(() if request.ignore_end else vocabulary.ends)}
        self._lookup = Lookup(request.prompt_ids)

    @property
    def usage(self) -> TokenUsage:
        """Tokens used so far."""
        expert_counts = dict(self._expert_counts)
        return TokenUsage(
            self._prompt_tokens, self.cached_tokens, sum(expert_counts.values()), expert_counts
        )

    @property
    def prefilling(self) -> bool:
        """Whether a part of the prompt has not been computed yet."""
        return self.state is not None and self.state.length < len(self.request.prompt_ids)

    def next_chunk(self, guesses: int = 0) -> Chunk:
        """Return the next chunk to compute: a piece of the prompt, or the last token and guesses.

        A prompt is cut at multiples of the block size, whatever else runs and wherever a cached
        prefix ends, so that the runner computes the same chunks in every case.

        Args:
            guesses: maximum number of guessed tokens.
        """
        assert self.state is not None
        if not self.prefilling:
            # Guesses must fit the capacity together with the last token and the one that follows.
            free_tokens = self.capacity - self.state.length - 2
            most = min(guesses, free_tokens) if isinstance(self.state, Rewindable) else 0
            ids = (self._token, *self._lookup.guess(most))
            return Chunk(self.state, ids, len(ids))
        prompt = self.request.prompt_ids
        start = self.state.length
        stop = min(len(prompt), (start // self.block + 1) * self.block)
        keep = int(stop == len(prompt))
        if self.request.prompt_logprobs:
            keep = max(keep, min(stop - start, stop - self.request.scored_from + 1))
        return Chunk(self.state, prompt[start:stop], keep)

    def advance(self, logits_RV: Logits, experts: Sequence[str | None]) -> list[TokenEvent]:
        """Process the logits of the last chunk and return the events of the tokens that they yield.

        Each token is sampled as if it were the only one. The logits after a guess are used only if
        the sampled token equals that guess; the state is rewound to the last accepted one.

        Args:
            logits_RV: logits of the kept tokens.
            experts: for each kept token, the expert with the largest weight, or an adapter if no
                expert fired; None: the base alone.

        Returns:
            One event for each new token; none within the prompt.
        """
        assert self.state is not None
        length = self.state.length
        prompt = self.request.prompt_ids
        if self.request.prompt_logprobs and length <= len(prompt):
            targets = prompt[length - len(logits_RV) + 1 : length + 1]
            self.prompt_logprobs += logprobs(
                logits_RV[: len(targets)], targets, self.request.logprobs or 0
            )
        if length < len(prompt):
            return []
        guesses = self._lookup.guesses
        events = list[TokenEvent]()
        for row in range(-1 - len(guesses), 0):
            events.append(self._sample(logits_RV[row], experts[row]))
            if self.finish_reason is not None or row == -1 or self._token != guesses[row + 1]:
                break
        if len(events) <= len(guesses):
            assert isinstance(self.state, Rewindable)
            self.state.rewind(length - 1 - len(guesses) + len(events))
        self._lookup.judge(len(events) - 1)
        return events

    def finish(self, reason: FinishReason, error: str | None = None) -> TokenEvent:
        """Mark the sequence as cancelled or failed and return its last event.

        Args:
            reason: the finish reason.
            error: one sentence on the failure, if the reason is "error".
        """
        self.finish_reason = reason
        return TokenEvent(None, self._text.flush(), finish_reason=reason, error=error)

    def failure(self, error: Exception) -> TokenEvent:
        """Mark the sequence as failed and return its last event.

        Args:
            error: what went wrong in it; a `UserError` is the request's own mistake.
        """
        if isinstance(error, UserError):
            return replace(self.finish("error", str(error)), refused=True)
        return self.finish("error", f"{type(error).__name__}: {error}")

    def _sample(self, logits_V: Logits, expert: str | None) -> TokenEvent:
        """Sample the next token and return its event."""
        top = self.request.logprobs
        self._token = token = self._sampler.next_token(
            logits_V, self._matcher.allowed() if self._matcher else None
        )
        self._lookup.push(token)
        if self._opening_bytes > 0:
            # Counted in bytes: a token can end within the character after the opening.
            self._opening_bytes -= len(self._token_bytes(token))
            self._opening_tokens += 1
            top = None  # it is not part of the reply
        else:
            self._expert_counts[expert] += 1
        logprob = None if top is None else logprobs(logits_V[None], [token], top)[0]
        text, self.finish_reason = self._decode(token)
        return TokenEvent(
            token,
            text,
            logprob,
            expert,
            self.finish_reason,
            stop_text=self._text.stop_text,
            held=self._text.held,
        )

    def _decode(self, token: int) -> tuple[str, FinishReason | None]:
        """Return the text that `token` adds, and the finish reason if it is the last token."""
        if token in self._ends:
            return self._text.flush(), "stop"
        complete = self._matcher is not None and self._matcher.take(token)
        text = self._text.push(token)
        if self.request.heal and self._text.skip == 0:
            self._matcher = None
        if self._text.stop_text is not None:
            return text, "stop"
        if complete or self._at_limit:
            return text + self._text.flush(), "stop" if complete else "length"
        return text, None

    @property
    def _at_limit(self) -> bool:
        """Whether no further token is requested or fits."""
        count = self._expert_counts.total()
        free_tokens = self.capacity - len(self.request.prompt_ids) - self._opening_tokens
        return count >= min(self.request.sampling.max_new_tokens, free_tokens)


def no_stored_experts(_: ArmedExperts | None) -> Mapping[ExpertModule, int]:
    """Return the memory of a sequence's stored experts if there are none."""
    return {}


def activate(
    request: Request,
    model: LanguageModel,
    vocabulary: Vocabulary,
    block: int,
    divides: Callable[[ArmedExperts | None], bool],
    expert_bytes: ExpertBytes = no_stored_experts,
) -> ActiveSequence:
    """Validate a request and return its sequence, with its experts chosen among those plugged now.

    Args:
        request: the prompt and its options.
        model: the model, with its plugged experts.
        vocabulary: the model's tokens.
        block: tokens in a prefill chunk.
        divides: whether the layers of a sequence with these experts may be divided into parts.
        expert_bytes: memory that a sequence needs for its stored experts; default: none.

    Raises:
        ConfigError: the request is too long for the model, has ids outside the vocabulary, its
            grammar does not compile, or its experts need more memory than the budget has.
        PackError: the request names an expert that is not plugged.
    """
    context = context_length(model)
    prompt_tokens = len(request.prompt_ids)
    if prompt_tokens >= context:
        raise ConfigError(
            f"The prompt has {prompt_tokens} tokens, but 1 to {context - 1} are possible; "
            "shorten it."
        )
    document = request.prompt_ids if request.document_ids is None else request.document_ids
    ids = (*request.prompt_ids, *(request.user_ids or ()), *document, *request.sampling.logit_bias)
    if min(ids) < 0 or max(ids) >= vocabulary.size:
        raise ConfigError(
            "The prompt, the user's words or logit_bias have a token id outside 0 to "
            f"{vocabulary.size - 1}; use the model's own tokenizer."
        )
    choice = request.experts
    # At least one token of the prompt stays.
    opening = vocabulary.opening(request.prompt_ids[1:]) if request.heal else NO_OPENING
    armed = model.experts.choose(
        choice.arm,
        choice.deny,
        choice.max_experts,
        user_ids=request.user_ids,
        document=document,
        expert_bytes=expert_bytes,
    )
    sizes = expert_bytes(armed)
    model.experts.weight_cache.check(sizes)
    if opening.tokens:
        request = replace(request, prompt_ids=request.prompt_ids[: -opening.tokens])
    # A token of the opening has at least one byte of it.
    most_new_tokens = len(opening.text.encode()) + request.sampling.max_new_tokens
    capacity = min(len(request.prompt_ids) + most_new_tokens, context)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    cuts = choose_cuts(layers, model.experts.first_layers) if divides(armed) else ()
    parts = layer_parts(layers, cuts)
    return ActiveSequence(request, armed, vocabulary, capacity, block, parts, sizes, opening)


def logprobs(logits_RV: Logits, targets: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return the log probabilities of each row's target and of its likeliest tokens.

    Args:
        logits_RV: logits `[R, V]`.
        targets: one token id for each row.
        top: number of likeliest tokens to report.
    """
    return [
        row_logprob(logits_V, target, top)
        for logits_V, target in zip(logits_RV, targets, strict=True)
    ]


def row_logprob(logits_V: Logits, target: int, top: int) -> TokenLogprob:
    """Return the log probabilities of `target` and of the `top` likeliest tokens."""
    logs_V = logits_V - logits_V.max()
    logs_V -= np.log(np.exp(logs_V).sum(dtype=np.float64)).astype(np.float32)
    top = min(top, len(logs_V))
    ids = np.argpartition(-logs_V, top - 1)[:top] if top else np.array([], np.int64)
    likeliest = sorted(
        zip(logs_V[ids].tolist(), ids.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1])
    )
    return TokenLogprob(
        target, float(logs_V[target]), tuple((token, log) for log, token in likeliest)
    )
