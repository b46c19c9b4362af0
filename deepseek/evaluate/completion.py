"""Lines completed by a served model, with or without retrieval, and their scores."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deepseek.data.text.document import Progress, silent
from deepseek.engine.engine import Engine
from deepseek.engine.generation import Generation
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.evaluate.answers import answer_text
from deepseek.evaluate.cases import Case, CaseEncoder, Prompt, as_far_as_asked
from deepseek.evaluate.scores import edit_similarity, is_exact
from deepseek.model.language_model import context_length
from deepseek.retrieval.index import Index
from deepseek.retrieval.prompt import before_text, query_of

BATCH = 16
"""Cases to complete concurrently; their prompts stay in the prefix cache until the true lines are
scored.
"""

TARGET_TOKENS = 256
"""Maximum tokens of a true line to score and to write; 200 characters of prose have fewer, even in
scripts with several tokens per character.
"""


def target_tokens(context: int) -> int:
    """Return the maximum tokens of a true line to score, and to write, in a context of `context`
    tokens, of which at least half are left for the prompt.
    """
    return min(TARGET_TOKENS, context // 2)


@dataclass(frozen=True)
class Dials:
    """Settings of the prompts.

    Attributes:
        text_tokens: maximum tokens of the document before the line.
        retrieved_tokens: budget of all passages together, in tokens.
        passages: maximum number of passages.
        reply_tokens: maximum tokens of a completion, raised to the length of the true line, which
            could not be written otherwise.
    """

    text_tokens: int = 256
    retrieved_tokens: int = 384
    passages: int = 4
    reply_tokens: int = 64

    def fitted(self, context: int) -> "Dials":
        """Return the settings scaled down to a context of `context` tokens, if necessary, so that
        text, passages, completion and true line fit into it. Each keeps at least one token.
        Headers of passages and text after the line are not counted: a prompt that is too long with
        them loses the text farthest from the line (see `CaseEncoder`).
        """
        sizes = (self.text_tokens, self.retrieved_tokens, self.reply_tokens)
        spare = max(0, context - target_tokens(context) - len(sizes))
        wanted = sum(sizes) - len(sizes)
        if wanted <= spare:
            return self
        text, retrieved, reply = (1 + (size - 1) * spare // wanted for size in sizes)
        return Dials(text, retrieved, self.passages, reply)


@dataclass(frozen=True)
class Completion:
    """Completion of one case.

    Attributes:
        written: the completed line.
        infilled: the line completed with the text after it as context; None if the model doesn't
            support infilling.
        nats: negative log-probability of the true line.
        target_tokens: number of tokens of the true line.
        prompt_tokens: tokens of the prompt.
        reply_tokens: tokens of the completion.
        seconds: duration of its batch per case, including retrieval.
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
    """Completes cases with one engine.

    Args:
        engine: engine of the model.
        experts: experts that may fire.
        index: index to retrieve passages from; None: no retrieval.
        dials: settings of the prompts.
    """

    def __init__(
        self, engine: Engine, experts: ExpertChoice, index: Index | None, dials: Dials
    ) -> None:
        self.engine = engine
        self.experts = experts
        self.index = index
        context = context_length(engine.model)
        self.dials = dials.fitted(context)
        self._target = target_tokens(context)
        room = max(1, context - self.dials.reply_tokens - self._target)
        self.encoder = CaseEncoder(engine.tokenizer, self.dials.text_tokens, room)

    def answers(
        self, cases: Sequence[Case], progress: Progress = silent, what: str = "writing"
    ) -> Iterator[Completion]:
        """Yield the completion of each case."""
        for start in range(0, len(cases), BATCH):
            progress(start, len(cases), what)
            yield from self._batch(cases[start : start + BATCH])
        progress(len(cases), len(cases), what)

    def context(self, case: Case) -> str:
        """Return the retrieved passages that precede the text of a case."""
        if self.index is None:
            return ""
        retrieved = self.index.retrieve(
            query_of(case.before),
            self.dials.passages,
            self.dials.retrieved_tokens,
            self.encoder.length,
        )
        return before_text(retrieved)

    def _batch(self, cases: Sequence[Case]) -> list[Completion]:
        """Return the completions of a few cases: write them concurrently, then score with cached
        prompts.
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
            nats = [-token.logprob for token in _all_scored(score) if token is not None]
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
        needed = min(len(prompt.target_ids) + 1, self._target)  # with the line end
        greedy = Sampling(max(self.dials.reply_tokens, needed), temperature=0.0)
        return self.engine.submit(Request(prompt.ids, greedy, self.experts, stop=("\n",)))

    def _score(self, prompt: Prompt) -> Generation:
        """Submit the true line for scoring; its prompt is still in the prefix cache."""
        ids = (*prompt.ids, *prompt.target_ids[: self._target])
        sampling = Sampling(1, temperature=0.0)
        return self.engine.submit(
            Request(
                ids,
                sampling,
                self.experts,
                logprobs=0,
                prompt_logprobs=True,
                scored_from=len(prompt.ids),
            )
        )


def first_line(generation: Generation) -> str:
    """Return the first line of a generation; raise `ConfigError` if it failed or was cancelled."""
    return answer_text(generation).split("\n", 1)[0]


def _all_scored(generation: Generation) -> tuple[Any, ...]:
    """Return the log-probabilities of a scored prompt, waiting for its generation."""
    answer_text(generation)
    return generation.prompt_logprobs


@dataclass(frozen=True)
class CompletionScores:
    """Scores of one row over all cases.

    Attributes:
        loss: nats per token of the true lines.
        exact: 1.0 for each case completed exactly, else 0.0.
        similarity: edit similarity of each case, 0 to 1.
        infilled: as `exact`, with the text after the line as context; None: the model doesn't
            support infilling.
        chrf: chrF of prose, 0 to 100 (sacrebleu); None without prose.
        prompt_tokens: mean tokens of a prompt.
        reply_tokens: mean tokens of a completion.
        seconds: mean seconds per completion.
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
    """Return the scores of completions; there must be at least one case."""
    count = len(cases)
    written = [
        (as_far_as_asked(answer.written, case), case.target)
        for case, answer in zip(cases, answers, strict=True)
    ]
    infilled = [
        float(is_exact(as_far_as_asked(answer.infilled, case), case.target))
        for case, answer in zip(cases, answers, strict=True)
        if answer.infilled is not None
    ]
    return CompletionScores(
        loss=sum(answer.nats for answer in answers)
        / max(1, sum(answer.target_tokens for answer in answers)),
        exact=[float(is_exact(line, target)) for line, target in written],
        similarity=[edit_similarity(line, target) for line, target in written],
        infilled=infilled if len(infilled) == count else None,
        chrf=_chrf(
            [pair for case, pair in zip(cases, written, strict=True) if case.kind == "text"]
        ),
        prompt_tokens=sum(answer.prompt_tokens for answer in answers) / count,
        reply_tokens=sum(answer.reply_tokens for answer in answers) / count,
        seconds=sum(answer.seconds for answer in answers) / count,
    )


def _chrf(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Return chrF (doi:10.18653/v1/W15-3049) of (written, true) lines, None without lines or
    sacrebleu.
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
