"""A request while it runs: the one thing in the engine that changes with every step.

Its next tokens are guessed from what followed the same words earlier in its text. A step reads all
weights whether it computes one token or a few, so guesses that turn out right are nearly free, and
those that turn out wrong change nothing: the token after each of them is chosen as it would have
been without them (prompt lookup, a speculative decoding without a second model: arXiv:2302.01318,
arXiv:2304.04487).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from deepseek.engine.prefix import block_keys
from deepseek.engine.request import FinishReason, Request, TokenEvent, TokenLogprob, TokenUsage
from deepseek.engine.sampler import Logits, Sampler
from deepseek.engine.vocabulary import TextStream, Vocabulary
from deepseek.errors import ConfigError
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk, SequenceState

WORDS = 2  # tokens that must be the same


class Lookup:
    """The tokens of one text, and where each pair of them was last followed by what.

    Attributes:
        guesses: those made last, which have not been judged.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._most = 1
        self.guesses: list[int] = []
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token to the text."""
        self._after[tuple(self._ids[-WORDS:])] = len(self._ids)
        self._ids.append(token)

    def guess(self, most: int) -> list[int]:
        """Return the tokens, `most` at most, that followed the last ones where these stood
        before.
        """
        start = self._after.get(tuple(self._ids[-WORDS:]), len(self._ids))
        self.guesses = self._ids[start : start + max(0, min(most, self._most))]
        return self.guesses

    def judge(self, right: int) -> None:
        """Take note of how many of the guesses were right: where most were, more come next time."""
        if self.guesses:
            self._most = 1 + 2 * right
            self.guesses = []


class ActiveSequence:
    """One request: its prompt is computed chunk by chunk, then one token a step, until something
    ends it.

    Attributes:
        armed: the experts that speak in it until it ends.
        capacity: most tokens, prompt included.
        keys: of the prompt's full blocks, or none where its prefix cannot be stored.
        state: what the runner keeps of it; None before its first step and after its last one.
        cancelled: set by any thread; it ends before the next step.
        finish_reason: why it is over; None while it is not.
        deliver: whoever waits for the events; the scheduler calls it with each.

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
    ) -> None:
        self.request = request
        self.armed = armed
        self.capacity = capacity
        self.block = block
        identity = "" if armed is None else armed.identity
        self.keys = [] if identity is None else block_keys(identity, request.prompt_ids, block)
        self.state: SequenceState | None = None
        self.cancelled = False
        self.finish_reason: FinishReason | None = None
        self.deliver: Callable[[TokenEvent], None] = lambda _: None
        unscored = request.scored_from if request.prompt_logprobs else 0
        self.prompt_logprobs: list[TokenLogprob | None] = [None] * unscored
        self.cached_tokens = 0
        self._spoken = Counter[str | None]()
        self._sampler = Sampler(request.sampling, request.prompt_ids)
        self._text = TextStream(vocabulary.tokenizer, request.stop)
        self._matcher = vocabulary.matcher(request.grammar) if request.grammar is not None else None
        self._ends = {*request.stop_token_ids, *(() if request.ignore_end else vocabulary.ends)}
        self._lookup = Lookup(request.prompt_ids)

    @property
    def usage(self) -> TokenUsage:
        """What it has used so far."""
        spoken = dict(self._spoken)
        return TokenUsage(
            len(self.request.prompt_ids), self.cached_tokens, sum(spoken.values()), spoken
        )

    @property
    def reusable(self) -> Sequence[bytes]:
        """Keys of the blocks that need not be computed: not the last token, whose logits are
        wanted.
        """
        wanted = (
            self.request.scored_from
            if self.request.prompt_logprobs
            else len(self.request.prompt_ids)
        )
        return self.keys[: (wanted - 1) // self.block]

    @property
    def prefilling(self) -> bool:
        """Whether some of the prompt is still to be computed."""
        return self.state is not None and self.state.length < len(self.request.prompt_ids)

    def next_chunk(self, guesses: int = 0) -> Chunk:
        """Return what to compute next, a token with `guesses` of those after it at most.

        A prompt is cut at multiples of the block whatever else runs and wherever a stored prefix
        ends, so that the numbers are the same to the last bit.
        """
        assert self.state is not None
        if not self.prefilling:
            room = self.capacity - self.state.length - 2 if self.state.rewinds else 0
            ids = (self._token, *self._lookup.guess(min(guesses, room)))
            return Chunk(self.state, ids, len(ids))
        prompt = self.request.prompt_ids
        start = self.state.length
        stop = min(len(prompt), (start // self.block + 1) * self.block)
        keep = int(stop == len(prompt))
        if self.request.prompt_logprobs:
            keep = max(keep, min(stop - start, stop - self.request.scored_from + 1))
        return Chunk(self.state, prompt[start:stop], keep)

    def advance(self, logits_RV: Logits, experts: Sequence[str | None]) -> list[TokenEvent]:
        """Take in what the runner said about the chunk, and return the tokens that it leads to.

        Each is chosen as if it were the only one; the next counts only if this one had been
        guessed.

        Args:
            logits_RV: of the kept tokens.
            experts: who spoke at each of them.
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
            events.append(self._speak(logits_RV[row], experts[row]))
            if self.finish_reason is not None or row == -1 or self._token != guesses[row + 1]:
                break
        if len(events) <= len(guesses):
            self.state.rewind(length - 1 - len(guesses) + len(events))
        self._lookup.judge(len(events) - 1)
        return events

    def finish(self, reason: FinishReason, error: str | None = None) -> TokenEvent:
        """End it from outside, cancelled or failed, and return its last event."""
        self.finish_reason = reason
        return TokenEvent(None, self._text.flush(), finish_reason=reason, error=error)

    def _speak(self, logits_V: Logits, expert: str | None) -> TokenEvent:
        """Choose the next token."""
        wanted = self.request.logprobs
        self._token = token = self._sampler.next_token(
            logits_V, self._matcher.allowed() if self._matcher else None
        )
        self._lookup.push(token)
        self._spoken[expert] += 1
        logprob = None if wanted is None else logprobs(logits_V[None], [token], wanted)[0]
        text, self.finish_reason = self._read(token)
        return TokenEvent(token, text, logprob, expert, self.finish_reason)

    def _read(self, token: int) -> tuple[str, FinishReason | None]:
        """Return the text that `token` adds and why it is the last one, if it is."""
        if token in self._ends:
            return self._text.flush(), "stop"
        complete = self._matcher is not None and self._matcher.take(token)
        text, stopped = self._text.push(token)
        if stopped:
            return text, "stop"
        if complete or self.usage.completion_tokens >= self.capacity - len(self.request.prompt_ids):
            return text + self._text.flush(), "stop" if complete else "length"
        return text, None


def activate(
    request: Request, model: DeepSeekModel, vocabulary: Vocabulary, block: int
) -> ActiveSequence:
    """Return `request` ready to run, with the experts that it chooses among those plugged now.

    Args:
        block: tokens by which its prompt is cut.

    Raises:
        ConfigError: it is too long for the model, has ids outside the vocabulary, or a grammar that
            does not compile.
        PackError: it names an expert that is not plugged.
    """
    context = model.config.max_position_embeddings
    given = len(request.prompt_ids)
    if given >= context:
        raise ConfigError(
            f"The prompt has {given} tokens, but 1 to {context - 1} are possible; shorten it."
        )
    ids = (*request.prompt_ids, *request.sampling.logit_bias)
    if min(ids) < 0 or max(ids) >= vocabulary.size:
        raise ConfigError(
            f"Token ids are 0 to {vocabulary.size - 1}; another one is in the prompt or in logit_bias."
        )
    choice = request.experts
    armed = model.experts.choose(
        choice.arm,
        choice.deny,
        choice.max_experts,
        user_ids=request.user_ids,
        document=request.prompt_ids,
    )
    capacity = min(given + request.sampling.max_new_tokens, context)
    return ActiveSequence(request, armed, vocabulary, capacity, block)


def logprobs(logits_RV: Logits, targets: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return for each row the log probability of its target and of the `top` likeliest tokens."""
    return [
        row_logprob(logits_V, target, top)
        for logits_V, target in zip(logits_RV, targets, strict=True)
    ]


def row_logprob(logits_V: Logits, target: int, top: int) -> TokenLogprob:
    """Return the log probability of `target` and of the `top` likeliest tokens."""
    logs_V = logits_V - logits_V.max()
    logs_V -= np.log(np.exp(logs_V).sum(dtype=np.float64)).astype(np.float32)
    ids = np.argpartition(-logs_V, top)[:top] if top else np.array([], np.int64)
    likeliest = sorted(
        zip(logs_V[ids].tolist(), ids.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1])
    )
    return TokenLogprob(
        target, float(logs_V[target]), tuple((token, log) for log, token in likeliest)
    )
