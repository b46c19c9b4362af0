"""Questions about the training documents as additional documents, for answers in a chat.

They are generated after the split: training documents yield training questions, held-out documents
only test questions.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from deepseek.checkpoint.store import atomic_write
from deepseek.data import Document, EncodeOptions
from deepseek.data.builders.questions import Question, all_questions, conversations
from deepseek.data.text.document import uniform
from deepseek.data.text.encode import DocumentEncoder
from deepseek.errors import DataError

QUESTIONS = 0.0
"""Default share of questions in an expert's training tokens: none. With a fifth, an expert learns
the form of the answers but not their content, and its gate fires on every conversation
(docs/log/questions.md, 2026-11-26).
"""

SAMPLE = 1 << 20
"""Characters from which the token count of all documents is extrapolated."""


@dataclass(frozen=True)
class QuestionMix:
    """Training documents with questions.

    Attributes:
        documents: each training document, followed by conversations about it.
        asked: questions in these conversations.
        unasked: further questions about the documents, beyond the share.
    """

    documents: list[Document]
    asked: list[Question]
    unasked: list[Question]


def mix_questions(
    train: list[Document],
    held_out: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    share: float,
    notes: Path,
) -> list[Document]:
    """Return the training documents with questions, and write all questions to `notes`.

    Without a share or a chat template, the documents are returned unchanged.

    Args:
        train: training documents.
        held_out: held-out documents; questions about them are only written to `notes`.
        tokenizer: tokenizer with a chat template.
        share: share of questions in the training tokens.
        notes: JSONL file for all questions, with their set: asked, unasked or held out.
    """
    if share == 0 or tokenizer.chat_template is None:
        mix = QuestionMix(train, [], all_questions(train))
    else:
        mix = with_questions(train, tokenizer, share)
    sets = {"asked": mix.asked, "unasked": mix.unasked, "held out": all_questions(held_out)}
    notes.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(notes) as temporary, temporary.open("w", encoding="utf-8") as file:
        for name, questions in sets.items():
            for question in questions:
                file.write(
                    json.dumps({"set": name, **question.record()}, ensure_ascii=False) + "\n"
                )
    return mix.documents


def asked_about(notes: Path) -> list[str]:
    """Return the questions about training documents from `notes`; empty without the file."""
    if not notes.is_file():
        return []
    # Not `splitlines`, which also splits at Unicode separators that JSON leaves unescaped.
    lines = notes.read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line]
    return [record["messages"][0]["content"] for record in records if record["set"] != "held out"]


def with_questions(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, share: float
) -> QuestionMix:
    """Return the documents with conversations that make up `share` of all tokens, drawn by hash.

    Raises:
        DataError: the share is outside [0, 1).
    """
    if not 0 <= share < 1:
        raise DataError(f"The share of questions must be at least 0 and below 1; it is {share}.")
    encoder = DocumentEncoder(tokenizer, EncodeOptions())
    budget = share / (1 - share) * estimated_tokens(documents, encoder)
    questions = all_questions(documents)
    shuffled = sorted(
        questions, key=lambda question: (question.source, uniform(f"mix:{question.question}"))
    )
    question_by_text = {question.question: question for question in questions}
    talks: dict[str, list[Document]] = defaultdict(list)
    asked: set[str] = set()
    for talk in sorted(conversations(shuffled), key=lambda talk: uniform(f"mix:{talk.name}")):
        messages = talk.messages()
        budget -= len(encoder.messages(talk))
        if budget < 0:
            break
        asked |= {message["content"] for message in messages[::2]}
        talks[question_by_text[messages[0]["content"]].source].append(talk)
    mixed = []
    for document in documents:
        mixed += [document, *talks[document.name]]
    return QuestionMix(
        mixed,
        [question for question in questions if question.question in asked],
        [question for question in questions if question.question not in asked],
    )


def estimated_tokens(documents: Iterable[Document], encoder: DocumentEncoder) -> float:
    """Return the number of tokens of documents, extrapolated from a sample."""
    shuffled = sorted(documents, key=lambda document: uniform(f"sample:{document.name}"))
    sample: list[Document] = []
    for document in shuffled:
        if sum(len(drawn.text) for drawn in sample) > SAMPLE:
            break
        sample.append(document)
    tokens = sum(len(ids) for ids in encoder.encode(sample))
    characters = sum(len(document.text) for document in sample)
    return tokens * sum(len(document.text) for document in shuffled) / max(1, characters)
