"""What a model is asked about text that nobody trained on: the next line, or a line that was taken
out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from deepseek.data.text.document import Document, Kind, uniform
from deepseek.data.text.encode import FIM_TOKENS, header
from deepseek.text.tokenizer import document_start_ids, plain_encoder

LEAST_LINES = 10
"""Lines before a line that is asked for: with fewer there is nothing to go on from."""

LEAST_CHARACTERS = 6
"""Of a line that is asked for: brackets and `else:` say nothing about who knows the text."""

SUFFIX_LINES = 10
"""Lines after a line that was taken out."""

PROSE_CHARACTERS = 200
"""Of a line of prose that is asked for; paragraphs can be lines."""


@dataclass(frozen=True)
class Case:
    """A line of a document, to be written again.

    Attributes:
        name, kind: of the document.
        line: its number, from 0.
        before, after: the text on both sides of it; `before` ends with the line's indentation.
        target: the line, without blanks around it.
    """

    name: str
    kind: Kind
    line: int
    before: str
    after: str
    target: str


def next_line_cases(documents: Iterable[Document], count: int, seed: int = 0) -> list[Case]:
    """Return at most `count` cases, spread evenly over the documents and drawn by `seed` and the
    documents' names.

    In a commit, only lines that it added are asked for.
    """
    queues = [queue for document in documents if (queue := _drawn_lines(document, seed))]
    chosen: list[Case] = []
    while queues and len(chosen) < count:
        for document, lines in queues:
            chosen.append(_case(document, lines.pop()))
        queues = [queue for queue in queues if queue[1]]
    return chosen[:count]


def _drawn_lines(document: Document, seed: int) -> tuple[Document, list[int]] | None:
    """Return a document and the numbers of its lines worth asking for in a random order, None if
    there are none.
    """
    lines = document.text.splitlines()
    added = "+" if document.kind == "commit" else ""
    worth = [
        number
        for number, line in enumerate(lines)
        if number >= LEAST_LINES
        and line.startswith(added)
        and _says_something(line.removeprefix(added))
    ]
    if not worth:
        return None
    order = np.random.default_rng(
        int(uniform(f"lines:{seed}:{document.name}") * 2**53)
    ).permutation(len(worth))
    return document, [worth[place] for place in order]


def _says_something(line: str) -> bool:
    line = line.strip()
    return (
        len(line) >= LEAST_CHARACTERS
        and sum(character.isalnum() for character in line) >= LEAST_CHARACTERS // 2
    )


def _case(document: Document, number: int) -> Case:
    lines = document.text.splitlines(keepends=True)
    line = lines[number]
    marker = "+" if document.kind == "commit" else ""
    content = line.removeprefix(marker)
    opening = marker + content[: len(content) - len(content.lstrip())]
    target = content.strip()
    if document.kind == "text":
        target = target[:PROSE_CHARACTERS]
    before = "".join(lines[:number]) + opening
    after = "".join(lines[number + 1 : number + 1 + SUFFIX_LINES])
    return Case(document.name, document.kind, number, before, after, target)


@dataclass(frozen=True)
class Prompt:
    """A case in tokens.

    Attributes:
        ids: what is given.
        target_ids: what goes on from it in the document.
    """

    ids: tuple[int, ...]
    target_ids: tuple[int, ...]


class CaseEncoder:
    """Makes prompts of cases for one tokenizer.

    Args:
        most_tokens: of the document before the line; what is further away is cut off at a line's
            start.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, most_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.most_tokens = most_tokens
        self.start = document_start_ids(tokenizer)
        self.markers = fim_marker_ids(tokenizer)
        self._encoder = plain_encoder(tokenizer)

    def length(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self._encoder.encode(text, add_special_tokens=False).ids)

    def next_line(self, case: Case, context: str = "") -> Prompt:
        """Return `context`, the document's header and its text up to the line, and the line.

        The tokens are those of the text as a whole: a prompt encoded alone would end with tokens,
        such as a run of blanks, that never stand before the line in a document.
        """
        head = context + (header(Document("", case.name, case.kind)) if case.kind != "text" else "")
        given = head + self._shortened(case.before)
        encoding = self._encoder.encode(given + case.target, add_special_tokens=False)
        first = next(
            (n for n, (_, stop) in enumerate(encoding.offsets) if stop > len(given)),
            len(encoding.ids),
        )
        first = max(first, 0 if self.start else 1)
        return Prompt((*self.start, *encoding.ids[:first]), tuple(encoding.ids[first:]))

    def infill(self, case: Case, context: str = "") -> Prompt | None:
        """Return the text on both sides of the line in the tokenizer's fill-in-the-middle form,
        None if it has none.
        """
        if self.markers is None:
            return None
        texts = [context + self._shortened(case.before), case.after, case.target]
        prefix, suffix, middle = (
            each.ids for each in self._encoder.encode_batch(texts, add_special_tokens=False)
        )
        ids = [self.markers[0], *prefix, self.markers[1], *suffix, self.markers[2]]
        return Prompt((*self.start, *ids), tuple(middle))

    def _shortened(self, text: str) -> str:
        """Return the last lines of a text that have at most `most_tokens` tokens together."""
        offsets = self._encoder.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= self.most_tokens:
            return text
        place = offsets[-self.most_tokens][0]
        line = text.find("\n", place) + 1
        return text[line or place :]


def fim_marker_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int, int] | None:
    """Return the tokens that open prefix, suffix and middle, None where the vocabulary has none.

    Unlike `data.encode.fim_markers` it spells nothing: a model that never met the markers cannot be
    asked by them.
    """
    vocabulary = tokenizer.get_added_vocab()
    for prefix, suffix, middle in FIM_TOKENS:
        if prefix in vocabulary and suffix in vocabulary and middle in vocabulary:
            return vocabulary[prefix], vocabulary[suffix], vocabulary[middle]
    return None


def by_document(cases: Sequence[Case]) -> int:
    """Return of how many documents the cases are."""
    return len({case.name for case in cases})
