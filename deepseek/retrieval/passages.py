"""Passages: the pieces of documents that retrieval finds and shows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deepseek.data.text.document import Document, Kind, split_lines
from deepseek.data.text.patches import message_and_patches

MATCHED_LINES = 12
"""Lines of a code passage that queries are matched against."""

SHOWN_LINES = 18
"""Lines of a code passage that are shown: the matched ones and what follows, since completion asks
for the continuation (RepoCoder, arXiv:2303.12570).
"""

STRIDE = 6
"""Lines between the starts of two code passages."""

PARAGRAPH_CHARACTERS = 900
"""Characters up to which paragraphs of prose are joined."""

LONGEST = 2400
"""Maximum characters per passage, as minified code and tables have very long lines."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document.

    Attributes:
        name: name of the document.
        kind: kind of the document.
        start: first line, counted from 0.
        stop: line after the last one.
        text: text to show.
        path: file that it belongs to, if that differs from the document's name, as in a commit;
            else empty.
        piece: place among the pieces of the same lines, where these are too long for one passage.
    """

    name: str
    kind: Kind
    start: int
    stop: int
    text: str
    path: str = ""
    piece: int = 0

    def overlaps(self, other: "Passage") -> bool:
        """Return whether both share text of the same document."""
        if self.name != other.name or self.start >= other.stop or other.start >= self.stop:
            return False
        are_pieces = (self.start, self.stop) == (other.start, other.stop)
        return not are_pieces or self.piece == other.piece

    def as_json(self) -> list[Any]:
        """Return the fields in their order."""
        return [self.name, self.kind, self.start, self.stop, self.text, self.path, self.piece]


def passages(document: Document) -> Iterator[tuple[Passage, str]]:
    """Yield the passages of a document, each with the text that queries are matched against."""
    if document.kind == "code":
        yield from _windows(document, document.text, 0)
    elif document.kind == "commit":
        yield from _changes(document)
    else:
        yield from _paragraphs(document)


def _windows(
    document: Document, text: str, first: int, path: str = ""
) -> Iterator[tuple[Passage, str]]:
    """Yield overlapping windows of lines.

    Args:
        document: document of the text.
        text: the text, or a part of it.
        first: line number of the text's first line in the document.
        path: file that the text belongs to; empty: the document.
    """
    lines = split_lines(text)
    last = max(0, len(lines) - MATCHED_LINES + STRIDE - 1) // STRIDE * STRIDE
    for start in range(0, last + 1, STRIDE):
        own_lines = lines[start:] if start == last else lines[start : start + STRIDE]
        if sum(map(len, own_lines)) > LONGEST:
            yield from _cut(document, first + start, own_lines, path)
            continue
        shown = lines[start : start + SHOWN_LINES]
        whole = "".join(shown)[:LONGEST]
        if whole.strip():
            matched = "".join(shown[:MATCHED_LINES])[:LONGEST]
            line = first + start
            yield (
                Passage(document.name, document.kind, line, line + len(shown), whole, path),
                matched,
            )


def _changes(document: Document) -> Iterator[tuple[Passage, str]]:
    """Yield windows of a commit's message and of each file's changes."""
    repository = document.name.rsplit("@", 1)[0]
    message, patches = message_and_patches(document.text)
    yield from _windows(document, message, 0)
    first = message.count("\n")
    for patch in patches:
        # A deletion shows the text of the file that it deletes.
        yield from _windows(document, patch.text, first, f"{repository}/{patch.path}")
        first += patch.text.count("\n")


def _paragraphs(document: Document) -> Iterator[tuple[Passage, str]]:
    """Yield paragraphs joined to a useful size; long ones are cut."""
    start = 0
    lines = split_lines(document.text)
    size = 0
    for place, line in enumerate(lines):
        size += len(line)
        ends = not line.strip() and size >= PARAGRAPH_CHARACTERS // 2
        if ends or size >= PARAGRAPH_CHARACTERS or place == len(lines) - 1:
            yield from _cut(document, start, lines[start : place + 1])
            start = place + 1
            size = 0


def _cut(
    document: Document, start: int, lines: list[str], path: str = ""
) -> Iterator[tuple[Passage, str]]:
    """Yield the lines as passages of at most `LONGEST` characters.

    Args:
        document: document of the lines.
        start: number of the first one in the document.
        lines: the lines, with their ends.
        path: file that they belong to; empty: the document.
    """
    text = "".join(lines)
    stop = start + len(lines)
    for place, begin in enumerate(range(0, len(text), LONGEST)):
        piece = text[begin : begin + LONGEST]
        if piece.strip():
            yield Passage(document.name, document.kind, start, stop, piece, path, place), piece
