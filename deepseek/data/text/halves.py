"""Split the held-out set into a validation part, which selects the checkpoint, and a test part, on
which results are reported.
"""

import json
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import accumulate, chain, groupby
from pathlib import PurePosixPath
from typing import Any

from deepseek.data.text.document import Document, Rule, characters, uniform
from deepseek.data.text.patches import message_and_patches

SMALLEST_PART = 0.25
"""Share of the text that each part should have. If whole documents cannot give it, every document
is cut in two.
"""

LONGEST_WORD = 40
"""Maximum characters of a word that is kept whole if that leaves less than the smallest part."""


def halve(
    documents: Sequence[Document], by: Rule = "file", seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Return (validation, test), each with about half of the held-out text and none in common.

    If halves of whole documents are too uneven (`SMALLEST_PART`), each document is cut in the
    middle, at the end of a line or of a message, and its first part goes to validation, unless
    whole documents are fairer: conversations with one answer cannot be cut. Commits beside files
    are then left out, unless the split is by time, since either half of a commit may show either
    half of a file. Validation is empty only if nothing can be divided.

    Args:
        documents: the held-out documents.
        by: rule of the split; default: `file`.

            - `file`: whole documents, in an order drawn from name and seed; a commit goes with the
              first file that it changes, without the changes of files in the other half.
            - `directory`: whole directories, so that neighbours stay together.
            - `time`: the test part is the later one.
        seed: seed of the order; unused by `time`.
    """

    def key(document: Document) -> tuple[float, str]:
        if by == "time":
            return float(document.time), ""
        name = changed_files(document)[0] if document.kind == "commit" else document.name
        name = str(PurePosixPath(name).parent) if by == "directory" else name
        return uniform(f"validation:{seed}:{name}"), name

    groups = [list(group) for _, group in groupby(sorted(documents, key=key), key)]
    parts = between_groups(groups)
    if by != "time":
        first, last = map(file_names, parts)
        parts = (
            [without_files(document, last) for document in parts[0]],
            [without_files(document, first) for document in parts[1]],
        )
    if smaller_part(parts) >= SMALLEST_PART * characters(documents):
        return parts
    files = [document for document in documents if document.kind != "commit"]
    cut_parts = cut_each(documents if by == "time" or not files else files)
    return max(cut_parts, parts, key=smaller_part)


def changed_files(commit: Document) -> list[str]:
    """Return the names of the documents of the files that a commit changes; its own if it changes
    none.
    """
    repository = commit.name.rsplit("@", 1)[0]
    _, patches = message_and_patches(commit.text)
    return [f"{repository}/{patch.path}" for patch in patches] or [commit.name]


def file_names(documents: Iterable[Document]) -> set[str]:
    """Return the names of all documents but commits."""
    return {document.name for document in documents if document.kind != "commit"}


def without_files(document: Document, names: AbstractSet[str]) -> Document:
    """Return a commit without the changes of these files; other documents unchanged."""
    if document.kind != "commit":
        return document
    repository = document.name.rsplit("@", 1)[0]
    message, patches = message_and_patches(document.text)
    remaining_patches = [
        patch.text for patch in patches if f"{repository}/{patch.path}" not in names
    ]
    return replace(document, text="".join([message, *remaining_patches]))


def between_groups(groups: Sequence[list[Document]]) -> tuple[list[Document], list[Document]]:
    """Return the first and the last groups of documents, the two parts as even as possible; one
    group is the second part.
    """
    sizes = list(accumulate(map(characters, groups)))
    cuts = range(1, len(groups))
    num_first = min(cuts, key=lambda cut: abs(2 * sizes[cut - 1] - sizes[-1]), default=0)
    return list(chain.from_iterable(groups[:num_first])), list(
        chain.from_iterable(groups[num_first:])
    )


def smaller_part(parts: tuple[list[Document], list[Document]]) -> int:
    """Return the number of characters of the smaller one of two parts."""
    return min(map(characters, parts))


def cut_each(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Return the first and the second halves of all documents; a document that cannot be cut is a
    second half.
    """
    first_parts = []
    second_parts = []
    for document in documents:
        first, second = cut_text(document)
        if first:
            first_parts.append(replace(document, text=first))
        second_parts.append(replace(document, text=second))
    return first_parts, second_parts


def cut_text(document: Document) -> tuple[str, str]:
    """Return the text of a document in two parts; the first is empty if it cannot be cut."""
    text = document.text
    if document.kind == "messages":
        messages = json.loads(text)
        positions = [
            position for position in range(1, len(messages)) if _are_dialogues(messages, position)
        ]
        if not positions:
            return "", text
        position = min(positions, key=lambda position: abs(2 * position - len(messages)))
        return json.dumps(messages[:position]), json.dumps(messages[position:])
    middle = len(text) // 2
    quarter = int(SMALLEST_PART * len(text))
    word = max(0, middle - LONGEST_WORD)
    for end, start in (("\n", quarter), (" ", quarter), ("\n", word), (" ", word)):
        position = text.rfind(end, start, middle) + 1
        if position:
            return text[:position], text[position:]
    return text[:middle], text[middle:]


def _are_dialogues(messages: list[Any], cut: int) -> bool:
    """Return whether a user speaks and is answered both before and after a cut, so that both parts
    have targets.
    """
    roles = [message["role"] for message in messages]
    before, after = roles[:cut], roles[cut:]
    return after[0] == "user" and "assistant" in before[1:] and "assistant" in after
