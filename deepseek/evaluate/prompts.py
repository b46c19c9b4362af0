"""Find prompts in an expert's held-out text that the expert answers and its base does not."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from transformers import PreTrainedTokenizerFast

from deepseek.data import TokenShards
from deepseek.data.text.decode import decode_documents
from deepseek.data.text.document import Document
from deepseek.data.text.encode import CONTEXT_BIT, header
from deepseek.engine.engine import Engine
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.evaluate.answers import answer_text
from deepseek.evaluate.cases import Case, next_line_cases
from deepseek.evaluate.quality import held_out_folder
from deepseek.evaluate.scores import edit_similarity
from deepseek.model.language_model import context_length
from deepseek.text.chat_template import encode_prompt, render, user_ids
from deepseek.text.control import control_tokens
from deepseek.text.tokenizer import document_start_ids, encode_plain

PROMPTS = 3
CANDIDATES = 24
"""Prompts to try."""

BATCH = 8
"""Prompts to try at a time; few, so that other requests find a place in the queue."""

TEXT_LINES = 12
"""Lines of a document in a prompt."""

TEXT_CHARACTERS = 1200
"""Maximum characters of these lines."""

QUESTION_CHARACTERS = 400
"""Maximum characters of a question."""

REPLY_TOKENS = 48

LEAST_COMPARED = 48
"""Minimum characters of the true answer to compare with, however short the written one is."""

LEAST_SIMILARITY = 0.6
"""Edit similarity to the true answer from which an answer counts as right."""

LEAST_GAIN = 0.2
"""Minimum lead in edit similarity over the base's answer."""


@dataclass(frozen=True)
class WorkingPrompt:
    """A prompt that shows what an expert knows.

    Attributes:
        kind: whether it is a message of a chat, or the beginning of a text to continue.
        text: the message, or the beginning.
    """

    kind: Literal["chat", "text"]
    text: str


@dataclass(frozen=True)
class Candidate:
    """A prompt with the answer that the held-out text gives."""

    prompt: WorkingPrompt
    answer: str


def working_prompts(
    engine: Engine, expert: str, count: int = PROMPTS, check: Callable[[], None] = lambda: None
) -> list[WorkingPrompt]:
    """Return prompts to which a plugged expert's greedy answer comes much closer to its held-out
    text than the base's.

    Args:
        engine: engine with the expert plugged.
        expert: name of a trained expert that still has its run folder.
        count: maximum number of prompts; there may be fewer, or none.
        check: called after each token; an error that it raises ends the work. Default: does
            nothing.

    Raises:
        ConfigError: the engine fails to answer.
    """
    shards = TokenShards(held_out_folder(expert))
    fitting_candidates = [
        candidate
        for candidate in candidates(shards, engine.tokenizer)
        if _fits(engine, candidate.prompt)
    ]
    expert_answers = _answers(engine, fitting_candidates, ExpertChoice((expert,)), check)
    base_answers = _answers(engine, fitting_candidates, ExpertChoice(()), check)
    return best(fitting_candidates, expert_answers, base_answers, count)


def best(
    prompt_candidates: Sequence[Candidate],
    expert_answers: Sequence[str],
    base_answers: Sequence[str],
    count: int,
) -> list[WorkingPrompt]:
    """Return the prompts with the largest gain in similarity, among those answered right.

    Args:
        prompt_candidates: prompts with the true answers.
        expert_answers: answers of the expert.
        base_answers: answers of the base.
        count: maximum number of prompts.
    """
    gains: dict[WorkingPrompt, float] = {}
    for candidate, expert_answer, base_answer in zip(
        prompt_candidates, expert_answers, base_answers, strict=True
    ):
        similarity = _similarity(expert_answer, candidate.answer)
        gain = similarity - _similarity(base_answer, candidate.answer)
        if similarity >= LEAST_SIMILARITY and gain >= LEAST_GAIN:
            gains[candidate.prompt] = gain
    return sorted(gains, key=lambda prompt: -gains[prompt])[:count]


def _similarity(reply: str, answer: str) -> float:
    """Return the similarity of an answer, possibly cut short, to as much of the true one."""
    reply = reply.strip()
    return edit_similarity(reply, answer.strip()[: max(len(reply), LEAST_COMPARED)])


def candidates(shards: TokenShards, tokenizer: PreTrainedTokenizerFast) -> list[Candidate]:
    """Return prompts of held-out text: questions of its conversations, beginnings of its other
    documents.
    """
    questions = [
        Candidate(WorkingPrompt("chat", question), answer)
        for question, answer in conversations(shards, tokenizer)
        if len(question) <= QUESTION_CHARACTERS
    ]
    documents = decode_documents(shards, tokenizer)
    lines = next_line_cases(documents, CANDIDATES - min(len(questions), CANDIDATES))
    return [*questions[:CANDIDATES], *(_line_candidate(case) for case in lines)]


def conversations(
    shards: TokenShards, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[str, str]]:
    """Yield the first question and its answer of each conversation."""
    if not tokenizer.chat_template:
        return
    form = _one_turn(tokenizer)
    control = control_tokens(tokenizer)
    for first, stop in pairwise(shards.offsets.tolist()):
        ids = (shards.ids_N[first:stop] & ~CONTEXT_BIT).tolist()
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        match = form.search(text)
        if match and not any(token in "".join(match.groups()) for token in control):
            yield match[1], match[2]


def _one_turn(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Return the form of a rendered conversation with a question and an answer as its groups."""
    marks = ("first-mark", "second-mark")
    conversation_text = render(
        tokenizer,
        [{"role": "user", "content": marks[0]}, {"role": "assistant", "content": marks[1]}],
    )
    form = re.escape(conversation_text.strip())
    for mark in marks:
        form = form.replace(re.escape(mark), "(.+?)")
    return re.compile(form, re.DOTALL)


def _line_candidate(case: Case) -> Candidate:
    """Return the lines before a line as a prompt, with the line as the answer.

    The prompt ends with a whole line, since tokens such as a run of spaces precede no word in the
    text that the model has learnt from.
    """
    whole_lines, _, line_start = case.before.rpartition("\n")
    lines = "\n".join(whole_lines.split("\n")[-TEXT_LINES:])[-TEXT_CHARACTERS:]
    head = header(Document("", case.name, case.kind)) if case.kind != "text" else ""
    return Candidate(WorkingPrompt("text", f"{head}{lines}\n"), line_start + case.target)


def _answers(
    engine: Engine,
    prompt_candidates: Sequence[Candidate],
    experts: ExpertChoice,
    check: Callable[[], None],
) -> list[str]:
    """Return the greedy answers of the model with some experts."""
    answers: list[str] = []
    for start in range(0, len(prompt_candidates), BATCH):
        requests = [
            _request(engine, candidate.prompt, experts)
            for candidate in prompt_candidates[start : start + BATCH]
        ]
        running = [engine.submit(request) for request in requests]
        try:
            answers += [answer_text(generation, check) for generation in running]
        finally:
            for generation in running:
                generation.cancel()
    return answers


def _fits(engine: Engine, prompt: WorkingPrompt) -> bool:
    """Return whether a prompt and its answer fit into the context."""
    request = _request(engine, prompt, ExpertChoice(()))
    num_tokens = len(request.prompt_ids) + request.sampling.max_new_tokens
    return num_tokens <= context_length(engine.model)


def _request(engine: Engine, prompt: WorkingPrompt, experts: ExpertChoice) -> Request:
    """Return the request for an answer; a text too long for the context loses its beginning."""
    tokenizer, context = engine.tokenizer, context_length(engine.model)
    sampling = Sampling(min(REPLY_TOKENS, context // 2), temperature=0.0)
    start = document_start_ids(tokenizer)
    max_prompt_tokens = context - sampling.max_new_tokens - len(start)
    if prompt.kind == "text":
        (ids,) = encode_plain(tokenizer, [prompt.text])
        return Request((*start, *ids[-max_prompt_tokens:]), sampling, experts, stop=("\n",))
    messages = [{"role": "user", "content": prompt.text}]
    return Request(
        tuple(encode_prompt(tokenizer, messages)),
        sampling,
        experts,
        user_ids=user_ids(tokenizer, messages),
    )
