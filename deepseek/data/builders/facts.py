"""Facts that a document states, before anybody asks for them, and whether an answer states them
too.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Check = tuple[str, ...]
"""What a right answer states, all of it: names, a value, a path, or a sentence in about these
words.
"""


@dataclass(frozen=True)
class Fact:
    """One thing that a document states.

    Attributes:
        kind: a key of `PHRASINGS`.
        what: what a question is about, as a question writes it: a name in backticks, a heading, a
            commit's subject.
        answer: in words of the document.
        check: see `Check`.
        place: the file, to tell things of the same name apart.
        argument: name of the argument that is asked for, if one is.
        language: in which to ask; "" if unknown.
    """

    kind: str
    what: str
    answer: str
    check: Check
    place: str = ""
    argument: str = ""
    language: str = "en"


def shown_path(name: str) -> str:
    """Return a document's path as its users write it: `repo/src/a.py` is `src/a.py`, `folder/a.py`
    stays.
    """
    parts = name.split("/")
    return "/".join(parts[1:] if len(parts) > 2 else parts)


LONGEST_ANSWER = 320
"""Characters: what a small model can say in one turn."""

SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=\S)|(?<=[。！？])")

ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|z\.B|bzw|d\.h|ca|p\.ex|es|Dr|Mr|Nr|No|St|\w))\.$"
)
"""Ends that are no ends of a sentence."""


def sentences(text: str) -> list[str]:
    """Return the sentences of a paragraph, blanks and line ends as one blank."""
    found = []
    held = ""
    for part in SENTENCE_END.split(" ".join(text.split())):
        held = f"{held} {part}".strip()
        if held and not ABBREVIATION.search(held):
            found.append(held)
            held = ""
    return [*found, held] if held else found


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, "" if there is none."""
    return next(iter(sentences(text)), "")


def shortened(paragraph: str, most: int = LONGEST_ANSWER) -> str:
    """Return as many whole sentences from the start of a paragraph as fit, "" if the first one does
    not.
    """
    kept = ""
    for sentence in sentences(paragraph):
        longer = f"{kept} {sentence}".strip()
        if len(longer) > most:
            break
        kept = longer
    return kept


TOKEN = re.compile(
    r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w|\.\d)"  # a whole number: 1 is neither in -1 nor in 0.1
    r"|[\u3040-\u30ff\u3400-\u9fff]"  # Chinese and Japanese write no blanks between words
    r"|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]"
)
IGNORED = re.compile(r"[\"'`“”„«»‘’*,;]|(?<=\d)_(?=\d)")
"""Quotes, emphasis and separators, which writers of the same answer choose differently."""

REACH = 60
"""Tokens from the start of an answer that count: who lists everything has not answered."""

LONGEST_RUN = 6
"""Tokens up to which a part of a check must stand in the answer as it is."""

OVERLAP = 0.7
"""Share of a longer part's words that the answer must contain, in this order."""


def tokens_of(text: str) -> list[str]:
    """Return what an answer is compared by: words, numbers and signs, without case and quotes."""
    return TOKEN.findall(IGNORED.sub("", text.casefold()))


def is_right(answer: str, check: Sequence[str]) -> bool:
    """Return whether an answer states every part of `check`.

    A short part must stand in it as it is, case, quotes and backticks aside, as whole words; of a
    longer one 70 % of the words must come in the same order (the recall of ROUGE-L, Lin 2004). Only
    the first 60 tokens count.
    """
    said = tokens_of(answer)[:REACH]
    return bool(check) and all(_states(said, tokens_of(part.rstrip(".。 "))) for part in check)


def _states(said: list[str], part: list[str]) -> bool:
    """Return whether the tokens of an answer state one part of a check."""
    if len(part) <= LONGEST_RUN:
        return bool(part) and part in _runs(said, len(part))
    words = [token for token in part if token[0].isalnum()]
    return bool(words) and common_length(said, words) >= OVERLAP * len(words)


def _runs(tokens: list[str], length: int) -> Iterator[list[str]]:
    for start in range(len(tokens) - length + 1):
        yield tokens[start : start + length]


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for index, other in enumerate(second, 1):
            above = row[index]
            row[index] = diagonal + 1 if token == other else max(above, row[index - 1])
            diagonal = above
    return row[-1]
