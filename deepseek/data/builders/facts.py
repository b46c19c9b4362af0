"""Facts stated by documents, and the check whether an answer states them too."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Check = tuple[str, ...]
"""Parts that a correct answer must all state: names, a value, a path, or a sentence in about these
words.
"""


@dataclass(frozen=True)
class Fact:
    """One fact stated by a document.

    Attributes:
        kind: a key of `phrasings.CODE` or `phrasings.PROSE`.
        what: the subject as written in a question: a name in backticks, a heading, or a commit's
            subject line.
        answer: the answer, in words of the document.
        check: see `Check`.
        place: the file, which distinguishes subjects of the same name; default: "".
        argument: name of the argument that is asked for; default: "" (none).
        language: language of the question; "" if unknown; default: `en`.
    """

    kind: str
    what: str
    answer: str
    check: Check
    place: str = ""
    argument: str = ""
    language: str = "en"


def shown_path(name: str) -> str:
    """Return a document's path as users write it: `repo/src/a.py` becomes `src/a.py`, `folder/a.py`
    stays.
    """
    parts = name.split("/")
    return "/".join(parts[1:] if len(parts) > 2 else parts)


LONGEST_ANSWER = 320
"""Maximum characters of an answer, about what a small model can write in one turn."""

SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=\S)|(?<=[。！？])")

ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|z\.B|bzw|d\.h|ca|p\.ex|es|Dr|Mr|Nr|No|St|\w))\.$"
)
"""Abbreviations, whose full stop does not end a sentence."""


def sentences(text: str) -> list[str]:
    """Return the sentences of a paragraph, with white space collapsed."""
    finished_sentences: list[str] = []
    parts: list[str] = []  # of the sentence that has not ended yet
    for part in SENTENCE_END.split(" ".join(text.split())):
        if part.strip():
            parts.append(part.strip())
        # Only the new part is searched: a text can be one long row of abbreviations.
        if parts and not ABBREVIATION.search(parts[-1]):
            finished_sentences.append(" ".join(parts))
            parts = []
    return [*finished_sentences, " ".join(parts)] if parts else finished_sentences


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, "" if there is none."""
    return next(iter(sentences(text)), "")


def shortened(paragraph: str, most: int = LONGEST_ANSWER) -> str:
    """Return as many leading sentences of a paragraph as fit into `most` characters, "" if the
    first one does not.
    """
    text = ""
    for sentence in sentences(paragraph):
        extended_text = f"{text} {sentence}".strip()
        if len(extended_text) > most:
            break
        text = extended_text
    return text


TOKEN = re.compile(
    r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w|\.\d)"  # a whole number: 1 is neither in -1 nor in 0.1
    r"|[\u3040-\u30ff\u3400-\u9fff]"  # Chinese and Japanese write no blanks between words
    r"|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]"
)
IGNORED = re.compile(r"[\"'`“”„«»‘’*,;]|(?<=\d)_(?=\d)")
"""Quotes, emphasis and separators, which vary between writings of the same answer."""

REACH = 60
"""Tokens at the start of an answer that count, so that listing everything is no correct answer."""

LONGEST_RUN = 6
"""Longest part of a check, in tokens, that must occur verbatim in the answer."""

OVERLAP = 0.7
"""Share of a longer part's words that the answer must contain, in the same order."""


def tokens_of(text: str) -> list[str]:
    """Return the tokens for comparing answers: words, numbers and signs, without case and
    quotes.
    """
    return TOKEN.findall(IGNORED.sub("", text.casefold()))


def is_right(answer: str, check: Sequence[str]) -> bool:
    """Return whether an answer states every part of `check`.

    A short part must occur in the answer as whole words, regardless of case, quotes and backticks.
    Of a longer part, 70 % of the words must occur in the same order (the recall of ROUGE-L, Lin
    2004). Only the first 60 tokens of the answer count.
    """
    answer_tokens = tokens_of(answer)[:REACH]
    parts = [tokens_of(part.rstrip(".。 ")) for part in check]
    return bool(check) and all(_states(answer_tokens, part) for part in parts)


def _states(answer_tokens: list[str], part: list[str]) -> bool:
    """Return whether the tokens of an answer state one part of a check."""
    if len(part) <= LONGEST_RUN:
        return bool(part) and part in _runs(answer_tokens, len(part))
    words = [token for token in part if token[0].isalnum()]
    return bool(words) and common_length(answer_tokens, words) >= OVERLAP * len(words)


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
