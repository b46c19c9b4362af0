"""Evaluation cases from held-out text: predict the next line, or infill a removed one."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from deepseek.data.text.document import Document, Kind, split_lines, uniform
from deepseek.data.text.encode import header
from deepseek.text.infilling import encode_around_gap, infill_layout
from deepseek.text.tokenizer import document_start_ids, encode_continued, plain_encoder

LEAST_LINES = 10
"""Lines that must precede a target line, as context."""

LEAST_CHARACTERS = 6
"""Minimum characters of a target line: brackets and `else:` don't distinguish models."""

WHAT_IS_ASKED = (
    f"a line of {LEAST_CHARACTERS} characters or more after the first {LEAST_LINES} of a document"
)
"""Description of a target line, for messages about texts without one."""

SUFFIX_LINES = 10
"""Lines of context after a removed line."""

PROSE_CHARACTERS = 200
"""Maximum characters of a target line in prose, where a line may be a paragraph."""

TAIL_CHARACTERS = 8
"""Characters per token of the end of a text that is tokenised to find its last tokens; tokens
have fewer on average.
"""


@dataclass(frozen=True)
class Case:
    """A line of a document to predict.

    Attributes:
        name: name of the document.
        kind: kind of the document.
        line: line number, from 0.
        before: text before the line, ending with the line's indentation.
        after: text after the line.
        target: the line without surrounding whitespace.
    """

    name: str
    kind: Kind
    line: int
    before: str
    after: str
    target: str


def next_line_cases(documents: Iterable[Document], count: int, seed: int = 0) -> list[Case]:
    """Return at most `count` cases, spread evenly over the documents.

    With more documents than cases, the seed determines which ones have a case. In commits, only
    added lines are targets.

    Args:
        documents: held-out documents.
        count: maximum number of cases.
        seed: with the documents' names, determines the choice.
    """
    queues = [queue for document in documents if (queue := _drawn_lines(document, seed))]
    queues.sort(key=lambda queue: uniform(f"documents:{seed}:{queue[0].name}"))
    chosen: list[Case] = []
    while queues and len(chosen) < count:
        for document, lines in queues:
            chosen.append(_case(document, lines.pop()))
        queues = [queue for queue in queues if queue[1]]
    return chosen[:count]


def _drawn_lines(document: Document, seed: int) -> tuple[Document, list[int]] | None:
    """Return a document and its suitable line numbers in random order, None if there are none."""
    lines = split_lines(document.text)
    added = "+" if document.kind == "commit" else ""
    suitable = [
        number
        for number, line in enumerate(lines)
        if number >= LEAST_LINES
        and line.startswith(added)
        and not (added and _names_file(lines, number))
        and _is_informative(line.removeprefix(added))
    ]
    if not suitable:
        return None
    order = np.random.default_rng(
        int(uniform(f"lines:{seed}:{document.name}") * 2**53)
    ).permutation(len(suitable))
    return document, [suitable[place] for place in order]


def _names_file(lines: list[str], number: int) -> bool:
    """Return whether a line of a commit names the file whose changes follow it."""
    return lines[number].startswith("+++ ") and lines[number - 1].startswith("--- ")


def _is_informative(line: str) -> bool:
    line = line.strip()
    return (
        len(line) >= LEAST_CHARACTERS
        and sum(character.isalnum() for character in line) >= LEAST_CHARACTERS // 2
    )


def _case(document: Document, number: int) -> Case:
    lines = split_lines(document.text)
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
    """A tokenised case.

    Attributes:
        ids: tokens of the prompt.
        target_ids: tokens of the target line.
    """

    ids: tuple[int, ...]
    target_ids: tuple[int, ...]


class CaseEncoder:
    """Encodes cases as prompts for one tokenizer.

    Args:
        tokenizer: tokenizer of the model.
        most_tokens: maximum tokens of the document before the line; earlier lines are dropped.
        room: maximum tokens of a whole prompt, passages and markers included; None: no limit. Text
            farthest from the line is dropped first.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, most_tokens: int, room: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.most_tokens = most_tokens
        self.room = sys.maxsize if room is None else room
        self.start = document_start_ids(tokenizer)
        self.layout = infill_layout(tokenizer)
        self._encoder = plain_encoder(tokenizer)

    def length(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self._encoder.encode(text, add_special_tokens=False).ids)

    def next_line(self, case: Case, context: str = "") -> Prompt:
        """Return the prompt of `context`, the document's header and its text up to the line.

        The text is tokenised as a whole. A prompt tokenised alone would end with tokens, such as a
        run of spaces, that never precede the line in a document.
        """
        head = context + (header(Document("", case.name, case.kind)) if case.kind != "text" else "")
        prefix = head + self._shortened(case.before)
        encoding = self._encoder.encode(prefix + case.target, add_special_tokens=False)
        first = next(
            (n for n, (_, stop) in enumerate(encoding.offsets) if stop > len(prefix)),
            len(encoding.ids),
        )
        first = max(first, 0 if self.start else 1)
        kept = max(0, first + len(self.start) - self.room)
        return Prompt((*self.start, *encoding.ids[kept:first]), tuple(encoding.ids[first:]))

    def infill(self, case: Case, context: str = "") -> Prompt | None:
        """Return the fill-in-the-middle prompt of a case, None if the tokenizer has no such
        tokens: the model was not trained for it then.
        """
        if not self.layout.has_tokens:
            return None
        around = encode_around_gap(
            self.tokenizer, self.layout, context + self._shortened(case.before), case.after
        )
        (middle,) = encode_continued(self.tokenizer, [case.target])
        # The tokens that mark the parts are never left out.
        room = max(0, self.room - len(self.start) - len(self.layout.join([], [])))
        suffix = around.suffix[: room // 4]
        prefix = around.prefix[max(0, len(around.prefix) + len(suffix) - room) :]
        return Prompt((*self.start, *self.layout.join(prefix, suffix)), tuple(middle))

    def _shortened(self, text: str) -> str:
        """Return the last lines of a text that fit into `most_tokens` tokens.

        A line is cut where leaving it out would leave less than half of these tokens.
        """
        size = TAIL_CHARACTERS * self.most_tokens
        while True:
            tail = text[-size:]
            offsets = self._encoder.encode(tail, add_special_tokens=False).offsets
            if len(offsets) > self.most_tokens:
                break
            if len(tail) == len(text):
                return text
            size *= 2
        place = offsets[-self.most_tokens][0]
        line = tail.find("\n", place) + 1
        half = offsets[-(self.most_tokens + 1) // 2][0]
        return tail[line if 0 < line <= half else place :]


def as_far_as_asked(written: str, case: Case) -> str:
    """Return a written line, truncated as the target of a case is: prose to `PROSE_CHARACTERS`."""
    return written.strip()[:PROSE_CHARACTERS] if case.kind == "text" else written
