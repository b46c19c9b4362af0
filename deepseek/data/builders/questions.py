"""Make questions and conversations from documents, with checks that recognise a correct answer.

Steps: document -> facts (`code_facts`, `prose_facts`) -> questions -> conversations.

Nothing is invented: answers quote docstrings, signatures, values, paths, commit messages and
paragraphs.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from deepseek.data.builders.code_facts import code_facts
from deepseek.data.builders.facts import Check, Fact, is_right
from deepseek.data.builders.phrasings import ask
from deepseek.data.builders.prose_facts import commit_facts, prose_facts
from deepseek.data.text.document import Document, conversation, uniform
from deepseek.terminal import is_unicode

MOST_PER_DOCUMENT = 200
"""Maximum questions about one document, selected by hash, so that a generated reference does not
outweigh everything else.
"""

TURNS = 3
"""Maximum questions in one conversation; several share the cost of the template's tokens."""


@dataclass(frozen=True)
class Question:
    """A question that a document answers.

    Attributes:
        question: wording used in training.
        paraphrase: wording reserved for evaluation.
        answer: the answer, in words of the document.
        kind: kind of fact, such as `default` or `section`.
        check: what a correct answer states; see `is_right`.
        source: name of the document.
    """

    question: str
    paraphrase: str
    answer: str
    kind: str
    check: Check
    source: str

    def messages(self) -> list[dict[str, str]]:
        """Return question and answer as messages."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]

    def record(self) -> dict[str, Any]:
        """Return the question as a JSONL record."""
        fields = {
            "kind": self.kind,
            "check": list(self.check),
            "paraphrase": self.paraphrase,
            "source": self.source,
        }
        return {"messages": self.messages(), **fields}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Question":
        """Return the question of a record written by `record`."""
        user_message, assistant_message = record["messages"]
        return cls(
            question=user_message["content"],
            paraphrase=record["paraphrase"],
            answer=assistant_message["content"],
            kind=record["kind"],
            check=tuple(record["check"]),
            source=record["source"],
        )


def facts_of(document: Document) -> list[Fact]:
    """Return the facts of a document, at most `MOST_PER_DOCUMENT`; a conversation has none.

    Facts that share a question with another one are dropped.
    """
    readers = {"code": code_facts, "text": prose_facts, "commit": commit_facts}
    facts = list(readers[document.kind](document)) if document.kind in readers else []
    counts = Counter((fact.kind, fact.what, fact.argument) for fact in facts)
    unique_facts = [
        fact
        for fact in facts
        if counts[fact.kind, fact.what, fact.argument] == 1 and is_sayable(fact)
    ]
    drawn_facts = sorted(unique_facts, key=lambda fact: _draw_lot(document, fact))[
        :MOST_PER_DOCUMENT
    ]
    drawn_ids = set(map(id, drawn_facts))
    return [fact for fact in unique_facts if id(fact) in drawn_ids]


def is_sayable(fact: Fact) -> bool:
    """Return whether a fact can be written as Unicode, and its answer passes its own check.

    A string literal in code may hold a lone surrogate.
    """
    return is_unicode(fact.what + fact.argument + fact.answer) and is_right(fact.answer, fact.check)


def _draw_lot(document: Document, fact: Fact) -> float:
    return uniform(f"question:{document.name}:{fact.kind}:{fact.what}:{fact.argument}")


def all_questions(documents: Iterable[Document]) -> list[Question]:
    """Return the questions that documents answer, in the documents' order; the result is
    deterministic.

    For a name defined in several places, questions name the file, and its location is not asked.
    Questions that give their own answer away are dropped.
    """
    facts_by_document = [(document.name, facts_of(document)) for document in documents]
    places: Counter[str] = Counter()
    for _, facts in facts_by_document:
        places.update({fact.what for fact in facts})
    return list(
        chain.from_iterable(
            questions_about(
                [fact for fact in facts if fact.place or places[fact.what] == 1], name, places
            )
            for name, facts in facts_by_document
        )
    )


def questions_about(
    facts: Iterable[Fact], source: str, places: Mapping[str, int]
) -> Iterator[Question]:
    """Yield a question for each fact of one document.

    Args:
        facts: the document's facts.
        source: name of the document.
        places: subject of a fact -> number of documents that define it; questions about a subject
            with several name the file.
    """
    for fact in facts:
        is_ambiguous = places[fact.what] > 1
        question = ask(fact, precise=is_ambiguous)
        paraphrase = ask(fact, reserved=True, precise=is_ambiguous)
        if not is_right(question, fact.check) and not is_right(paraphrase, fact.check):
            yield Question(question, paraphrase, fact.answer, fact.kind, fact.check, source)


def conversations(questions: Sequence[Question], turns: int = TURNS) -> Iterator[Document]:
    """Yield questions as conversations of 1 to `turns` turns about one document, with lengths drawn
    by hash.
    """
    pending: list[Question] = []
    for question in questions:
        length = 1 + int(uniform(f"turns:{pending[0].question}") * turns) if pending else 1
        if pending and (len(pending) >= length or pending[0].source != question.source):
            yield _conversation(pending)
            pending = []
        pending.append(question)
    if pending:
        yield _conversation(pending)


def _conversation(questions: Sequence[Question]) -> Document:
    messages = [message for question in questions for message in question.messages()]
    return conversation(
        messages, questions[0].source, f"{questions[0].source}#{questions[0].question}"
    )
