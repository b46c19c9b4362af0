"""Choose the text of an update: what is new in a source, and about as much known text."""

from collections.abc import Sequence

from deepseek.data import Document
from deepseek.data.text.document import characters, uniform
from deepseek.errors import DataError
from deepseek.train.text.corpus import KnownDocuments

LEAST_PAST = 40_000
"""Minimum characters of known text to train on again, if there are as many."""

LEAST_VALIDATION = 4_000
"""Minimum characters of known text to validate on, if there are as many: about 1,000 tokens."""


def fresh(
    train: Sequence[Document],
    validation: Sequence[Document],
    *,
    known: KnownDocuments,
    seed: int,
    name: str,
) -> tuple[list[Document], list[Document]]:
    """Return the documents to train on and to validate on: new ones, and about as much text of
    known ones.

    If no validation document is new, the new training documents stand in for them: a small change
    seldom brings text to hold out. Known text to validate on is never trained on.

    Args:
        train: training documents.
        validation: held-out documents to choose the best state by.
        known: documents of earlier runs.
        seed: determines which of the known documents are taken.
        name: name of the expert, for the message.

    Raises:
        DataError: no training document is new.
    """
    new = [document for document in train if not known.has_learnt(document)]
    if not new:
        raise DataError(
            f"The source of {name} has changed, but holds no new text to train on: what changed is "
            "held out, no text, or only gone; change more, or train it anew."
        )
    held_out = [document for document in validation if not known.has_held_out(document)] or new
    learnt = [document for document in train if known.has_learnt(document)]
    tested = [document for document in validation if known.has_held_out(document)]
    replayed = past(learnt, len(known.train), seed, max(LEAST_PAST, characters(new)))
    wanted = max(LEAST_VALIDATION, characters(held_out))
    return [*new, *replayed], [*held_out, *past(tested, len(known.held_out), seed, wanted)]


def past(documents: Sequence[Document], known: int, seed: int, wanted: int) -> list[Document]:
    """Return known documents with at least the characters wanted, if there are as many.

    Args:
        documents: known documents to choose from.
        known: number of all known documents; when it grows, the order is drawn anew.
        seed: determines the order, with `known`.
        wanted: minimum characters.
    """
    former = sorted(documents, key=lambda document: uniform(f"past:{seed}:{known}:{document.name}"))
    chosen: list[Document] = []
    for document in former:
        if wanted <= 0:
            break
        chosen.append(document)
        wanted -= len(document.text)
    return chosen
