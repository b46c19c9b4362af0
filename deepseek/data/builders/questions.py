"""Conversations made from a source: questions that its own words answer, and how a right answer is
told.

document -> facts (`code_facts`, `prose_facts`) -> questions -> conversations

Nothing is invented: answers are docstrings, signatures, values, paths, commit messages and
paragraphs as written.
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

MOST_PER_DOCUMENT = 200
"""Questions about one document, chosen by hash; a generated reference would otherwise outweigh
everything else.
"""

TURNS = 3
"""Most questions in one conversation: the template's own tokens are then paid once."""


@dataclass(frozen=True)
class Question:
    """A question that a source answers.

    Attributes:
        question: as training asks it.
        paraphrase: the same asked in a way that no training uses.
        answer: in words of the source.
        kind: of fact, such as `default` or `section`.
        check: what a right answer states; see `is_right`.
        source: name of the document.
    """

    question: str
    paraphrase: str
    answer: str
    kind: str
    check: Check
    source: str

    def messages(self) -> list[dict[str, str]]:
        """Return one turn."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]

    def record(self) -> dict[str, Any]:
        """Return the question as a line of a JSONL file."""
        fields = {
            "kind": self.kind,
            "check": list(self.check),
            "paraphrase": self.paraphrase,
            "source": self.source,
        }
        return {"messages": self.messages(), **fields}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Question":
        """Return the question that `record` gave."""
        asked, answered = record["messages"]
        return cls(
            question=asked["content"],
            paraphrase=record["paraphrase"],
            answer=answered["content"],
            kind=record["kind"],
            check=tuple(record["check"]),
            source=record["source"],
        )


def facts_of(document: Document) -> list[Fact]:
    """Return what a document states, at most `MOST_PER_DOCUMENT` facts; a conversation states
    nothing of its own.
    """
    readers = {"code": code_facts, "text": prose_facts, "commit": commit_facts}
    facts = list(readers[document.kind](document)) if document.kind in readers else []
    about = Counter((fact.kind, fact.what, fact.argument) for fact in facts)
    single = [
        fact
        for fact in facts
        if about[fact.kind, fact.what, fact.argument] == 1 and is_sayable(fact)
    ]
    chosen = sorted(single, key=lambda fact: _lot(document, fact))[:MOST_PER_DOCUMENT]
    kept = set(map(id, chosen))
    return [fact for fact in single if id(fact) in kept]


def is_sayable(fact: Fact) -> bool:
    """Return whether the answer to a fact is right by its own check."""
    return is_right(fact.answer, fact.check)


def _lot(document: Document, fact: Fact) -> float:
    return uniform(f"question:{document.name}:{fact.kind}:{fact.what}:{fact.argument}")


def questions_of(document: Document) -> list[Question]:
    """Return the questions that a document answers; the same document gives the same ones."""
    return all_questions([document])


def all_questions(documents: Iterable[Document]) -> list[Question]:
    """Return the questions that documents answer, in their order.

    Questions about a name that several places define say the file, and where it is is not asked. A
    question that gives its own answer away is left out.
    """
    stated = {document.name: facts_of(document) for document in documents}
    places = Counter(what for facts in stated.values() for what in {fact.what for fact in facts})
    return list(
        chain.from_iterable(
            questions_about(
                [fact for fact in facts if fact.place or places[fact.what] == 1], name, places
            )
            for name, facts in stated.items()
        )
    )


def questions_about(
    facts: Iterable[Fact], source: str, places: Mapping[str, int]
) -> Iterator[Question]:
    """Yield a question for each fact of one document; those about what is in several `places` say
    in which.
    """
    for fact in facts:
        vague = places[fact.what] > 1
        asked = ask(fact, precise=vague)
        again = ask(fact, reserved=True, precise=vague)
        if not is_right(asked, fact.check) and not is_right(again, fact.check):
            yield Question(asked, again, fact.answer, fact.kind, fact.check, source)


def conversations(questions: Sequence[Question], turns: int = TURNS) -> Iterator[Document]:
    """Yield questions as conversations of one to `turns` turns about one document, their lengths
    drawn by hash.
    """
    held: list[Question] = []
    for question in questions:
        wanted = 1 + int(uniform(f"turns:{held[0].question}") * turns) if held else 1
        if held and (len(held) >= wanted or held[0].source != question.source):
            yield _conversation(held)
            held = []
        held.append(question)
    if held:
        yield _conversation(held)


def _conversation(questions: Sequence[Question]) -> Document:
    messages = [message for question in questions for message in question.messages()]
    return conversation(
        messages, questions[0].source, f"{questions[0].source}#{questions[0].question}"
    )
