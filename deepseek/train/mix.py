"""Several domains of text as one stream of batches: weighted, easy rows first where asked, resumed from a few integers.

Which domain a row of a batch comes from is a function of its place alone: a golden-ratio sequence, in which every
stretch of rows holds the domains in very nearly their shares. Within a domain every row comes once an epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from deepseek.data.loader import Batch, RowLoader
from deepseek.data.permutation import endless
from deepseek.errors import DataError
from deepseek.train.curriculum import EASY_TEXT

GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Domain:
    """Packed rows of one kind of text.

    Attributes:
        name: as reports call it.
        train, held_out: its rows; those to train on lie from easy to hard.
        weight: its share of the mix, relative to the others'.
    """

    name: str
    train: RowLoader
    held_out: RowLoader
    weight: float


class MixedRows:
    """Batches of `rows` rows from several domains; the first `easy_rows` are drawn from the easy part of each."""

    def __init__(self, domains: Sequence[Domain], rows: int, easy_rows: int, seed: int) -> None:
        self.domains, self.rows, self.easy_rows, self.seed = domains, rows, easy_rows, seed
        weights = np.array([domain.weight for domain in domains])
        self.bounds = (weights / weights.sum()).cumsum()[:-1]
        easy = np.bincount(self.domains_at(0, easy_rows), minlength=len(domains))
        self.orders = [Order(domain.train.num_rows, int(n), seed) for domain, n in zip(domains, easy, strict=True)]
        self.place = 0
        self.taken = np.zeros(len(domains), dtype=np.int64)

    def domains_at(self, start: int, stop: int) -> NDArray[np.intp]:
        """Return the index of the domain of each row at places [start, stop) of the stream."""
        return np.searchsorted(self.bounds, np.arange(start + 1, stop + 1) * GOLDEN % 1.0, side="right")

    def next(self) -> Batch:
        """Return the next batch and move on."""
        parts = []
        for index in self.domains_at(self.place, self.place + self.rows):
            row = self.orders[index].row(int(self.taken[index]))
            parts.append(self.domains[index].train.rows(row))
            self.taken[index] += 1
        self.place += self.rows
        return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in Batch.__dataclass_fields__))

    def state(self) -> dict[str, int]:
        """Return what `load` needs to go on from here."""
        taken = {f"taken.{d.name}": int(n) for d, n in zip(self.domains, self.taken, strict=True)}
        return {"place": self.place, **taken, **self.identity()}

    def load(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken; raise `DataError` if the text, its order or the row length is another."""
        for name, value in self.identity().items():
            if state.get(name) != value:
                raise DataError(f"The run was started with another {name}; restore it or start a new run folder.")
        self.place = state["place"]
        self.taken = np.array([state[f"taken.{domain.name}"] for domain in self.domains], dtype=np.int64)

    def identity(self) -> dict[str, int]:
        """Return what decides the stream."""
        texts = {f"text of {d.name}": int(d.train.shards.digest[:15], 16) for d in self.domains}
        return {"seed": self.seed, "row length": self.domains[0].train.length, "curriculum": self.easy_rows, **texts}


class Order:
    """The rows of a domain in the order they are trained on: `easy` of its first ones, the rest, then whole epochs."""

    def __init__(self, num_rows: int, easy: int, seed: int) -> None:
        self.num_rows, self.easy, self.seed = num_rows, easy, seed
        self.easy_rows = max(1, round(EASY_TEXT * num_rows))
        seen = endless(0, min(easy, self.easy_rows), self.easy_rows, seed)
        self.rest = np.setdiff1d(np.arange(num_rows), seen)

    def row(self, place: int) -> int:
        """Return the row at `place` of the endless order."""
        if place < self.easy:
            return self._one(place, self.easy_rows)
        place -= self.easy
        if place < len(self.rest):
            return int(self.rest[self._one(place, len(self.rest))])
        return self._one(place - len(self.rest) + self.num_rows, self.num_rows)  # the first epoch is behind us

    def _one(self, place: int, size: int) -> int:
        return int(endless(place, place + 1, size, self.seed)[0])
