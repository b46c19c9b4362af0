"""Held-out text: by file, stable when files are added, or by time, so that the future stays unseen."""

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Literal

from deepseek.data.document import Document, uniform
from deepseek.errors import DataError

Rule = Literal["file", "directory", "time"]


def split(
    documents: Sequence[Document], held_out: float = 0.1, by: Rule = "file", seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Return (train, held out), about the share `held_out` of the documents in the second, both in the given order.

    - `file`: a hash of name and seed decides for each document alone, so adding files moves no other.
    - `directory`: the same with the folder's name, so that neighbours stay together.
    - `time`: all documents later than a cut are held out; equal times stay together.

    Raises `DataError` if either side would be empty.
    """
    if not 0 < held_out < 1:
        raise DataError(f"The held-out share must lie between 0 and 1; it is {held_out}.")
    chosen = by_time(documents, held_out) if by == "time" else by_hash(documents, held_out, by, seed)
    train = [document for document, held in zip(documents, chosen, strict=True) if not held]
    test = [document for document, held in zip(documents, chosen, strict=True) if held]
    if not train or not test:
        empty = "train on" if not train else "hold out"
        raise DataError(f"Of {len(documents)} documents none is left to {empty}; give more or another held-out share.")
    return train, test


def by_hash(documents: Iterable[Document], held_out: float, by: Rule, seed: int) -> list[bool]:
    """Return whether each document is held out, from a hash of its name or folder."""
    keys = (str(PurePosixPath(d.name).parent) if by == "directory" else d.name for d in documents)
    draws = [uniform(f"{seed}:{key}") for key in keys]
    cut = sorted(set(draws))[:-1]  # of a few documents one is held out and one kept, whatever they draw
    limit = min(max(held_out, cut[0]), cut[-1]) if cut else 0.0
    return [draw <= limit for draw in draws]


def by_time(documents: Sequence[Document], held_out: float) -> list[bool]:
    """Return whether each document lies after the cut that leaves about `held_out` of them behind it."""
    times = sorted(document.time for document in documents)
    if not times or times[0] == times[-1]:
        raise DataError("The documents carry no different times; split by file instead.")
    cut = times[max(0, min(len(times) - 1, round(len(times) * (1 - held_out)) - 1))]
    if cut == times[-1]:  # many documents share the last time: cut just before it
        cut = max(time for time in times if time < cut)
    return [document.time > cut for document in documents]
