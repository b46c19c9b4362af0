"""Keep documents on their side of the split when a source is read again for an update.

The split draws lots by name. A renamed file, or a record that moves to another line, would draw
anew: text that was trained on could be tested on, and text that has chosen the best state could be
reported on.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from deepseek.data.text.document import Document, KnownNames
from deepseek.errors import DataError


def keep_sides(
    train: Sequence[Document],
    held_out: Sequence[Document],
    learnt: AbstractSet[str],
    tested: AbstractSet[str],
    names: KnownNames,
) -> tuple[list[Document], list[Document]]:
    """Return training and held-out documents, with known ones on their former side.

    Args:
        train: training documents.
        held_out: held-out documents.
        learnt: digests of texts that were trained on before; they count before `tested`.
        tested: digests of texts that were held out before.
        names: former and later names of documents whose side is known; checked after the digests,
            for texts that have changed.

    Raises:
        DataError: nothing is left to hold out.
    """

    def was_held_out(document: Document) -> bool | None:
        digest = document.text_digest
        if digest in learnt or digest in tested:
            return digest not in learnt
        return names.is_held_out(document.name)

    kept = [document for document in train if was_held_out(document) is not True]
    known = [document for document in held_out if was_held_out(document) is False]
    again = [document for document in train if was_held_out(document) is True]
    new = [document for document in held_out if was_held_out(document) is not False]
    if not again and not new:
        raise DataError(
            "All text that would be held out was learnt before; add new text, or train anew."
        )
    return [*kept, *known], [*again, *new]


def keep_validation(
    validation: Sequence[Document], test: Sequence[Document], validated: AbstractSet[str]
) -> tuple[list[Document], list[Document]]:
    """Return validation and test documents; test documents that validated before move over.

    Args:
        validation: held-out documents that choose the best state.
        test: held-out documents to report on.
        validated: digests of texts by which a best state was chosen before.

    Raises:
        DataError: nothing is left to report on.
    """
    used = [document for document in test if document.text_digest in validated]
    unused = [document for document in test if document.text_digest not in validated]
    if test and not unused:
        raise DataError(
            "All text to report on has chosen a best state before; add new text, or train anew."
        )
    return [*validation, *used], unused
