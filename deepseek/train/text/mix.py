"""Mix several domains into one stream of batches, optionally with easy rows first.

The position in the stream is a few integers, from which it resumes. The domain of a row depends on
its position alone, by a golden-ratio sequence: any stretch of rows contains the domains almost
exactly in their shares. Within a domain every row occurs once per epoch.

Three signals that need no model define easy text: how well it compresses (noise and boilerplate
both differ from ordinary prose), whether code parses, and how short words and sentences are. They
are compared as ranks within a domain, so that units and languages don't matter. Evidence that easy
text first saves early steps: arXiv:2506.11300.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from deepseek.data.builders.functions import parsed
from deepseek.data.text.document import Document
from deepseek.data.text.loader import Batch, RowLoader, endless
from deepseek.errors import DataError

EASY_STEPS = 0.2
"""Share of the steps in the easy phase."""

EASY_TEXT = 0.4
"""Share of each domain's rows that count as easy."""

SAMPLE = 20_000
"""Characters of a document to examine."""

ORDINARY_RATIO = 0.45
"""Compression ratio (compressed over original size) of ordinary prose and code."""

PAIRS = {")": "(", "]": "[", "}": "{"}
SENTENCE = re.compile(r"[.!?。！？]+\s|\n+")


def easiest_first(documents: Sequence[Document]) -> list[Document]:
    """Return the documents of a domain from easy to hard."""
    if not documents:
        return []
    signals = np.array(
        [[compression(d.text), malformed(d), reading_effort(d.text)] for d in documents]
    )
    ranks = signals.argsort(axis=0, kind="stable").argsort(axis=0).astype(float)
    # Malformed code comes last: this exceeds the sum of the two other ranks.
    ranks[:, 1] = signals[:, 1] * 2 * len(documents)
    return [documents[index] for index in ranks.sum(axis=1).argsort(kind="stable")]


def compression(text: str) -> float:
    """Return the distance of a text's compression ratio from that of ordinary text."""
    data = text[:SAMPLE].encode("utf-8", "surrogatepass")
    return abs(len(zlib.compress(data, 6)) / max(1, len(data)) - ORDINARY_RATIO)


def malformed(document: Document) -> float:
    """Return 1.0 for Python that doesn't parse or other code with unmatched brackets, else 0.0."""
    if document.kind != "code":
        return 0.0
    python = document.name.endswith(".py")
    formed = parsed(document.text) is not None if python else _brackets_match(document.text)
    return 0.0 if formed else 1.0


def reading_effort(text: str) -> float:
    """Return words per sentence plus ten times characters per word, similar to Flesch-Kincaid."""
    sample = text[:SAMPLE]
    words = sample.split()
    sentences = SENTENCE.split(sample)
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


GOLDEN = 0.6180339887498949
"""Golden ratio less 1: its multiples modulo 1 are evenly distributed."""


@dataclass(frozen=True)
class Domain:
    """Packed rows of one domain.

    Attributes:
        name: name in reports.
        train: training rows, from easy to hard.
        held_out: held-out rows.
        weight: weight in the mix, relative to the other domains.
    """

    name: str
    train: RowLoader
    held_out: RowLoader
    weight: float


class MixedRows:
    """Batches from several domains."""

    def __init__(self, domains: Sequence[Domain], rows: int, easy_rows: int, seed: int) -> None:
        """Create the stream.

        Args:
            domains: domains to mix.
            rows: rows per batch.
            easy_rows: number of first rows that come from the easy part of each domain.
            seed: seed of the order within domains.
        """
        self.domains = domains
        self.rows = rows
        self.easy_rows = easy_rows
        self.seed = seed
        weights = np.array([domain.weight for domain in domains])
        self.bounds = (weights / weights.sum()).cumsum()[:-1]
        easy = np.bincount(self.domains_at(0, easy_rows), minlength=len(domains))
        self.row_ids = [domain.train.row_ids for domain in domains]
        self.orders = [
            Order(len(ids), int(n), seed) for ids, n in zip(self.row_ids, easy, strict=True)
        ]
        self.place = 0
        self.taken = np.zeros(len(domains), dtype=np.int64)

    def domains_at(self, start: int, stop: int) -> NDArray[np.intp]:
        """Return the domain index of each row at positions [start, stop) of the stream."""
        return np.searchsorted(
            self.bounds, np.arange(start + 1, stop + 1) * GOLDEN % 1.0, side="right"
        )

    def next(self) -> Batch:
        """Return the next batch and advance."""
        parts = []
        for index in self.domains_at(self.place, self.place + self.rows):
            place = self.orders[index].row(int(self.taken[index]))
            parts.append(self.domains[index].train.rows(int(self.row_ids[index][place])))
            self.taken[index] += 1
        self.place += self.rows
        return Batch(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in Batch.__dataclass_fields__
            )
        )

    def state(self) -> dict[str, int]:
        """Return the position, for `load`."""
        taken = {f"taken.{d.name}": int(n) for d, n in zip(self.domains, self.taken, strict=True)}
        return {"place": self.place, **taken, **self.identity()}

    def load(self, state: dict[str, int]) -> None:
        """Resume from `state`.

        Raises:
            DataError: text, seed, curriculum or row length differ.
        """
        for name, value in self.identity().items():
            if state.get(name) != value:
                raise DataError(
                    f"The run was started with another {name}; "
                    "restore it or start a new run folder."
                )
        self.place = state["place"]
        self.taken = np.array(
            [state[f"taken.{domain.name}"] for domain in self.domains], dtype=np.int64
        )

    def identity(self) -> dict[str, int]:
        """Return everything that determines the stream, as integers."""
        texts = {f"text of {d.name}": int(d.train.shards.digest[:15], 16) for d in self.domains}
        loaded = {
            f"rows of {d.name}": len(d.train.row_ids)
            for d in self.domains
            if d.train.chosen is not None
        }
        return {
            "seed": self.seed,
            "row length": self.domains[0].train.length,
            "curriculum": self.easy_rows,
            **texts,
            **loaded,
        }


class Order:
    """Endless order of a domain's rows: `easy` rows of its easy part, the remaining rows, then
    whole epochs.
    """

    def __init__(self, num_rows: int, easy: int, seed: int) -> None:
        self.num_rows = num_rows
        self.easy = easy
        self.seed = seed
        self.easy_rows = max(1, round(EASY_TEXT * num_rows))
        seen = endless(0, min(easy, self.easy_rows), self.easy_rows, seed)
        self.rest = np.setdiff1d(np.arange(num_rows), seen)

    def row(self, place: int) -> int:
        """Return the row at `place` of the endless order."""
        if place < self.easy:
            return self._shuffled_row(place, self.easy_rows)
        place -= self.easy
        if place < len(self.rest):
            return int(self.rest[self._shuffled_row(place, len(self.rest))])
        # Add one epoch, since the first one has been used up above.
        return self._shuffled_row(place - len(self.rest) + self.num_rows, self.num_rows)

    def _shuffled_row(self, place: int, size: int) -> int:
        return int(endless(place, place + 1, size, self.seed)[0])
