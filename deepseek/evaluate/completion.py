"""Lines written by a served model, with or without retrieved passages before the text, and their
scores.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deepseek.data.text.document import Progress, silent
from deepseek.engine.engine import Engine
from deepseek.engine.generation import Generation
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.errors import ConfigError
from deepseek.evaluate.cases import Case, CaseEncoder, Prompt
from deepseek.evaluate.scores import edit_similarity, is_exact
from deepseek.retrieval.index import Index
from deepseek.retrieval.prompt import before_text, query_of

BATCH = 16
"""Cases that are written side by side; their prompts stay in the prefix cache until their true
lines are scored.
"""

TARGET_TOKENS = 128
"""Of a true line at most; what is longer counts up to there."""


@dataclass(frozen=True)
class Dials:
    """How cases are asked.

    Attributes:
        text_tokens: of the document before the line.
        retrieved_tokens: of all passages together.
        passages: how many at most.
        reply_tokens: that a model may write for one line.
    """

    text_tokens: int = 256
    retrieved_tokens: int = 384
    passages: int = 4
    reply_tokens: int = 64

    def fitted(self, context: int) -> "Dials":
        """Return these dials for a model whose context has so many tokens."""
        whole = self.text_tokens + self.retrieved_tokens + self.reply_tokens + TARGET_TOKENS
        if whole <= context:
            return self
        text, retrieved, reply = (
            max(1, size * context // whole)
            for size in (self.text_tokens, self.retrieved_tokens, self.reply_tokens)
        )
        return Dials(text, retrieved, self.passages, reply)


@dataclass(frozen=True)
class Completion:
    """What a model made of one case.

    Attributes:
        written: the line.
        infilled: the line written with the text after it in view; None where the model cannot be
            asked so.
        nats: negative log probability of the true line.
        target_tokens: over how many tokens.
        prompt_tokens, reply_tokens: of the written line.
        seconds: share of the time of its batch, retrieval included.
    """

    written: str
    infilled: str | None
    nats: float
    target_tokens: int
    prompt_tokens: int
    reply_tokens: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class Writer:
    """Asks one engine for the lines of cases.

    Args:
        experts: who may speak.
        index: where passages come from; None: the text alone.
    """

    def __init__(
        self, engine: Engine, experts: ExpertChoice, index: Index | None, dials: Dials
    ) -> None:
        self.engine = engine
        self.experts = experts
        self.index = index
        self.dials = dials.fitted(engine.model.config.max_position_embeddings)
        self.encoder = CaseEncoder(engine.tokenizer, self.dials.text_tokens)
        self._room = max(
            1, engine.model.config.max_position_embeddings - self.dials.reply_tokens - TARGET_TOKENS
        )

    def answers(
        self, cases: Sequence[Case], progress: Progress = silent, what: str = "writing"
    ) -> Iterator[Completion]:
        """Yield the answer to each case."""
        for start in range(0, len(cases), BATCH):
            progress(start, len(cases), what)
            yield from self._batch(cases[start : start + BATCH])
        progress(len(cases), len(cases), what)

    def context(self, case: Case) -> str:
        """Return what is put before the text of a case."""
        if self.index is None:
            return ""
        found = self.index.retrieve(
            query_of(case.before),
            self.dials.passages,
            self.dials.retrieved_tokens,
            self.encoder.length,
        )
        return before_text(found)

    def _batch(self, cases: Sequence[Case]) -> list[Completion]:
        """Return the answers to a few cases, written side by side, then scored on what is still
        cached.
        """
        started = time.perf_counter()
        contexts = [self.context(case) for case in cases]
        prompts = [
            self.encoder.next_line(case, context)
            for case, context in zip(cases, contexts, strict=True)
        ]
        running = [self._write(prompt) for prompt in prompts]
        written = [first_line(generation) for generation in running]
        seconds = (time.perf_counter() - started) / len(cases)
        scored = [self._score(prompt) for prompt in prompts]
        infills = [
            self.encoder.infill(case, context)
            for case, context in zip(cases, contexts, strict=True)
        ]
        filling = [None if prompt is None else self._write(prompt) for prompt in infills]
        answers = []
        for text, generation, score, infill in zip(written, running, scored, filling, strict=True):
            nats = [-one.logprob for one in _all_scored(score) if one is not None]
            answers.append(
                Completion(
                    written=text,
                    infilled=None if infill is None else first_line(infill),
                    nats=sum(nats),
                    target_tokens=len(nats),
                    prompt_tokens=generation.usage.prompt_tokens,
                    reply_tokens=generation.usage.completion_tokens,
                    seconds=seconds,
                )
            )
        return answers

    def _write(self, prompt: Prompt) -> Generation:
        greedy = Sampling(self.dials.reply_tokens, temperature=0.0)
        return self.engine.submit(
            Request(prompt.ids[-self._room :], greedy, self.experts, stop=("\n",))
        )

    def _score(self, prompt: Prompt) -> Generation:
        """Have the log probabilities of the true line computed; its prompt was just written
        from.
        """
        given = prompt.ids[-self._room :]
        ids = (*given, *prompt.target_ids[: TARGET_TOKENS - 1])
        one = Sampling(1, temperature=0.0)
        return self.engine.submit(
            Request(
                ids, one, self.experts, logprobs=0, prompt_logprobs=True, scored_from=len(given)
            )
        )


def first_line(generation: Generation) -> str:
    """Return the text of a generation up to its first line end; raise `ConfigError` if it
    failed.
    """
    text = ""
    for event in generation:
        text += event.text
        if event.finish_reason == "error":
            raise ConfigError(f"A line could not be written: {event.error}")
    return text.split("\n", 1)[0]


def _all_scored(generation: Generation) -> tuple[Any, ...]:
    """Return the log probabilities of a scored prompt once it is computed."""
    first_line(generation)
    return generation.prompt_logprobs


@dataclass(frozen=True)
class CompletionScores:
    """Means over the cases of one way to answer.

    Attributes:
        loss: nats a token of the true lines.
        exact: of each case, 1.0 if the line was written exactly.
        similarity: of each case, 0 to 1.
        infilled: of each case as `exact`, with the text after the line in view; None: the model has
            no such prompt.
        chrf: of prose, 0 to 100 (chrF, sacrebleu); None where there is no prose.
        prompt_tokens, reply_tokens, seconds: of a reply.
    """

    loss: float
    exact: list[float]
    similarity: list[float]
    infilled: list[float] | None
    chrf: float | None
    prompt_tokens: float
    reply_tokens: float
    seconds: float


def score_answers(cases: Sequence[Case], answers: Sequence[Completion]) -> CompletionScores:
    """Return the scores of answers to cases, at least one of them."""
    count = len(cases)
    pairs = list(zip(cases, answers, strict=True))
    infilled = [
        float(is_exact(a.infilled, case.target)) for case, a in pairs if a.infilled is not None
    ]
    return CompletionScores(
        loss=sum(answer.nats for answer in answers)
        / max(1, sum(answer.target_tokens for answer in answers)),
        exact=[float(is_exact(answer.written, case.target)) for case, answer in pairs],
        similarity=[edit_similarity(answer.written, case.target) for case, answer in pairs],
        infilled=infilled if len(infilled) == count else None,
        chrf=_chrf(
            [(answer.written, case.target) for case, answer in pairs if case.kind == "text"]
        ),
        prompt_tokens=sum(answer.prompt_tokens for answer in answers) / count,
        reply_tokens=sum(answer.reply_tokens for answer in answers) / count,
        seconds=sum(answer.seconds for answer in answers) / count,
    )


def _chrf(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Return chrF (doi:10.18653/v1/W15-3049) of (written, true) lines, None without lines or
    without sacrebleu.
    """
    try:
        from sacrebleu import corpus_chrf
    except ImportError:
        return None
    if not pairs:
        return None
    return float(
        corpus_chrf([written for written, _ in pairs], [[target for _, target in pairs]]).score
    )
