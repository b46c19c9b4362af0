"""Easy text first: which documents are well formed, by signals that need no model.

Three signals: how well a text compresses (both noise and boilerplate lie away from ordinary prose), whether it parses
where it is code, and how short its words and sentences are. They are compared as ranks within a domain, so that neither
units nor languages matter. Evidence that easy text first saves early steps: arXiv:2506.11300.
"""

import re
import zlib
from collections.abc import Sequence

import numpy as np

from deepseek.data.document import Document
from deepseek.data.functions import parsed

EASY_STEPS = 0.2
"""Share of the steps that the easy phase takes."""

EASY_TEXT = 0.4
"""Share of each domain's rows that count as easy."""

SAMPLE = 20_000
"""Characters of a document that are looked at."""

ORDINARY_RATIO = 0.45
"""Compressed size over size of ordinary prose and code."""

PAIRS = {")": "(", "]": "[", "}": "{"}
SENTENCE = re.compile(r"[.!?。！？]+\s|\n+")


def easiest_first(documents: Sequence[Document]) -> list[Document]:
    """Return the documents of a domain from easy to hard."""
    if not documents:
        return []
    signals = np.array([[compression(d.text), malformed(d), reading_effort(d.text)] for d in documents])
    ranks = signals.argsort(axis=0, kind="stable").argsort(axis=0).astype(float)
    ranks[:, 1] = signals[:, 1] * len(documents)  # what does not parse comes last
    return [documents[index] for index in ranks.sum(axis=1).argsort(kind="stable")]


def compression(text: str) -> float:
    """Return how far the compression ratio of a text is from that of ordinary text."""
    data = text[:SAMPLE].encode("utf-8", "surrogatepass")
    return abs(len(zlib.compress(data, 6)) / max(1, len(data)) - ORDINARY_RATIO)


def malformed(document: Document) -> float:
    """Return 1.0 for Python that does not parse and other code whose brackets do not match, else 0.0."""
    if document.kind != "code":
        return 0.0
    python = document.name.endswith(".py")
    formed = parsed(document.text) is not None if python else _brackets_match(document.text)
    return 0.0 if formed else 1.0


def reading_effort(text: str) -> float:
    """Return words a sentence plus ten times characters a word, near what Flesch-Kincaid weighs in any language."""
    sample = text[:SAMPLE]
    words, sentences = sample.split(), SENTENCE.split(sample)
    letters = sum(map(len, words))
    return len(words) / max(1, len(sentences)) + 10 * letters / max(1, len(words))


def _brackets_match(text: str) -> bool:
    open_now: list[str] = []
    for character in text:
        if character in "([{":
            open_now.append(character)
        elif character in PAIRS and (not open_now or open_now.pop() != PAIRS[character]):
            return False
    return not open_now
