"""Load rows of fixed length from token shards, in a random order that a few integers can resume.

The random order of n items takes no memory: it is a keyed Feistel network with cycle walking.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek.data.text.encode import CONTEXT_BIT
from deepseek.data.text.shards import TokenShards
from deepseek.errors import DataError

ROUNDS = 6
"""Rounds of the Feistel network. Four rounds are pseudo-random in theory (Luby and Rackoff 1988);
two more compensate for the short halves of a small n.
"""

GOLDEN = 0x9E3779B97F4A7C15
MASK_64 = (1 << 64) - 1


def mix(value: int) -> int:
    """Return a well-mixed 64-bit number (splitmix64's finaliser, Steele et al. 2014)."""
    value = (value + GOLDEN) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


def permute(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the item at each position in the random order of an epoch, a bijection of [0, size).

    Args:
        positions: positions in [0, size).
        size: number of items.
        seed: seed of all epochs.
        epoch: number of the epoch.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = [mix(mix(mix(seed & MASK_64) ^ epoch) + index) for index in range(ROUNDS)]
    values = feistel(positions.astype(np.uint64), half_bits, keys)
    is_outside = values >= size
    # Cycle walking takes a few turns: the network's domain is smaller than four times `size`.
    while is_outside.any():
        values[is_outside] = feistel(values[is_outside], half_bits, keys)
        is_outside = values >= size
    return values.astype(np.int64)


def endless(start: int, stop: int, size: int, seed: int) -> NDArray[np.int64]:
    """Return the items at positions [start, stop) of an endless sequence of epochs, each of which
    holds `size` items once.
    """
    epochs, positions = np.divmod(np.arange(start, stop, dtype=np.int64), size)
    parts = [
        permute(positions[epochs == epoch], size, seed, int(epoch)) for epoch in np.unique(epochs)
    ]
    return np.concatenate([positions[:0], *parts])


def feistel(values: NDArray[np.uint64], half_bits: int, keys: list[int]) -> NDArray[np.uint64]:
    """Apply a keyed bijection of [0, 4**half) to `values`, one round per key."""
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left = values >> shift
    right = values & mask
    for key in keys:
        left, right = right, left ^ (scramble(right ^ np.uint64(key)) & mask)
    return (left << shift) | right


def scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return hashed numbers (MurmurHash3's finaliser); the products wrap on purpose."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


IGNORE = -100
"""Label that the loss ignores, as PyTorch's cross-entropy does."""


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens; all tensors are int64.

    Attributes:
        input_ids: `[B, T]`, token ids.
        labels: `[B, T]`, the target of each position (already shifted), `IGNORE` for none.
        position_ids: `[B, T]`, counted from 0 in each document and again at the start of a row.
        row_ids: `[B]`, indices of the packed rows.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    row_ids: Tensor


class RowLoader:
    """Loads batches of packed rows; each epoch yields every row once, in an order of its own.

    Row i holds tokens `[i * length, (i + 1) * length)` of the shards. A document cut by a row
    boundary starts again at position 0 in the next row. The label of a row's last token is the
    document's next token, so no target is lost: each token that follows another in its document is
    a target exactly once per epoch. Batches are always full; a batch can hold the last rows of one
    epoch and the first of the next.

    Args:
        shards: the tokens.
        rows: rows per batch.
        length: tokens per row.
        seed: seed of the order; default: 0.
        chosen: indices of the rows to load; default: all rows.

    Attributes:
        num_rows: number of rows in the shards.
        cursor: rows returned since the first epoch.

    Raises:
        DataError: `rows` or `length` is below 1.
    """

    def __init__(
        self,
        shards: TokenShards,
        rows: int,
        length: int,
        seed: int = 0,
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        if rows < 1 or length < 1:
            raise DataError(f"Rows ({rows}) and length ({length}) of a batch must be at least 1.")
        self.shards = shards
        self.batch_rows = rows
        self.length = length
        self.seed = seed
        self.chosen = chosen
        # Minus 1: a row with only the last token would have no target.
        self.num_rows = max(1, -(-(shards.num_tokens - 1) // length))
        self.cursor = 0

    @property
    def row_ids(self) -> NDArray[np.int64]:
        """Indices of the loaded rows, in the order of the shards or of `chosen`."""
        return np.arange(self.num_rows) if self.chosen is None else self.chosen

    def first(self, rows: int) -> "RowLoader":
        """Return a loader restricted to the first `rows` rows of the first epoch, at most all."""
        return self._restrict_to(self.order(0, min(rows, len(self.row_ids))))

    def with_targets(self) -> "RowLoader":
        """Return a loader restricted to the rows in which something is to be predicted.

        In conversations with long user messages, many rows have no target. They would take the
        place of others in a plan, and a loss over them alone is undefined.

        Raises:
            DataError: no row has a target.
        """
        is_target_N = np.append(self.shards.ids_N < CONTEXT_BIT, False)
        is_target_N[self.shards.offsets.astype(np.int64)] = False  # nothing precedes these
        targets = self.num_rows * self.length
        is_label_N = np.pad(is_target_N[1 : targets + 1], (0, targets))[:targets]
        rows = np.flatnonzero(is_label_N.reshape(self.num_rows, self.length).any(1))
        if not len(rows):
            raise DataError(
                f"The text in {self.shards.folder} has nothing to predict; give conversations with "
                "answers of the assistant, or other text."
            )
        return self if len(rows) == self.num_rows else self._restrict_to(rows)

    def _restrict_to(self, row_ids: NDArray[np.int64]) -> "RowLoader":
        return RowLoader(self.shards, self.batch_rows, self.length, self.seed, row_ids)

    def next(self) -> Batch:
        """Return the next batch and advance the cursor."""
        batch = self.rows(self.order(self.cursor, self.cursor + self.batch_rows))
        self.cursor += self.batch_rows
        return batch

    def order(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the row ids at positions [start, stop) of the endless sequence of epochs."""
        if self.chosen is None:
            return endless(start, stop, self.num_rows, self.seed)
        return self.chosen[endless(start, stop, len(self.chosen), self.seed)]

    def batches(self) -> list[Batch]:
        """Return every row once, in the order of `row_ids`; the last batch can be smaller."""
        ids = self.row_ids
        size = self.batch_rows
        return [self.rows(ids[start : start + size]) for start in range(0, len(ids), size)]

    def rows(self, row_ids: int | NDArray[np.int64] | list[int]) -> Batch:
        """Return the packed rows with these ids as a batch; an integer gives a batch of one row.

        Raises:
            DataError: a row id is out of range.
        """
        indices = np.atleast_1d(np.asarray(row_ids, dtype=np.int64))
        if ((indices < 0) | (indices >= self.num_rows)).any():
            raise DataError(f"Row ids must lie in [0, {self.num_rows}); got {indices.tolist()}.")
        parts = [self.row(int(index)) for index in indices]
        ids, labels, positions = (
            torch.from_numpy(np.stack(column)) for column in zip(*parts, strict=True)
        )
        return Batch(ids, labels, positions, torch.from_numpy(indices.copy()))

    def row(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return ids, labels and positions `[T]` of one row.

        Padding at the end has id 0 and counts as a separate document.
        """
        length = self.length
        first = index * self.length
        tokens = np.zeros(length + 1, dtype=np.uint32)
        available_tokens = self.shards.ids_N[first : first + length + 1]
        tokens[: len(available_tokens)] = available_tokens
        is_start = self.starts(first, length)
        places = np.arange(length)
        positions = places - np.maximum.accumulate(np.where(is_start[:length], places, 0))
        targets = tokens[1:]
        labels = np.where(
            is_start[1:] | (targets & CONTEXT_BIT != 0), IGNORE, targets.astype(np.int64)
        )
        labels[max(0, len(available_tokens) - 1) :] = IGNORE
        return (tokens[:length] & ~CONTEXT_BIT).astype(np.int64), labels, positions

    def starts(self, first: int, length: int) -> NDArray[np.bool_]:
        """Return `[length + 1]`: whether a document, or the padding after the last one, begins at
        each token from `first` on.
        """
        offsets = self.shards.offsets
        # Bounds of another type would have NumPy convert all offsets, for each row.
        bounds = np.array([first, first + length + 1], dtype=offsets.dtype)
        low, high = np.searchsorted(offsets, bounds)
        is_start = np.zeros(length + 1, dtype=np.bool_)
        is_start[offsets[low:high].astype(np.int64) - first] = True
        return is_start

    def state(self) -> dict[str, int]:
        """Return the state from which `load` resumes."""
        identity = int(self.shards.digest[:15], 16)
        state = {
            "cursor": self.cursor,
            "seed": self.seed,
            "length": self.length,
            "shards": identity,
        }
        return state if self.chosen is None else {**state, "chosen": len(self.chosen)}

    def load(self, state: dict[str, int]) -> None:
        """Resume from a state.

        Raises:
            DataError: the state is of other tokens, other rows, another seed or row length.
        """
        expected_state = self.state()
        for name in ("seed", "length", "shards", "chosen"):
            if state.get(name) != expected_state.get(name):
                part = {"shards": "tokens", "chosen": "rows"}.get(name, name)
                raise DataError(
                    f"The run was started with other {part}; "
                    "restore them or start a new run folder."
                )
        self.cursor = state["cursor"]
