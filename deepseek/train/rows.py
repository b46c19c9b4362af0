"""A fixed choice of packed rows, pass after pass."""

import numpy as np
from numpy.typing import NDArray

from deepseek.data.loader import Batch, RowLoader
from deepseek.data.permutation import permute


class ChosenRows:
    """Batches of `rows` rows out of `row_ids`; every one once per epoch, in an order drawn from seed and epoch.

    As with `RowLoader`, batches are always full and the whole state is where the next row lies.
    """

    def __init__(self, loader: RowLoader, row_ids: NDArray[np.int64], rows: int, seed: int) -> None:
        self.loader, self.row_ids, self.rows, self.seed = loader, row_ids, rows, seed
        self.cursor = 0

    def next(self) -> Batch:
        """Return the next batch and move on."""
        places = np.arange(self.cursor, self.cursor + self.rows, dtype=np.int64)
        epochs, within = np.divmod(places, len(self.row_ids))
        order = np.concatenate(
            [permute(within[epochs == e], len(self.row_ids), self.seed, int(e)) for e in np.unique(epochs)]
        )
        self.cursor += self.rows
        return self.loader.rows(self.row_ids[order])

    def state(self) -> dict[str, int]:
        """Return what `load` needs to go on from here."""
        return {**self.loader.state(), "cursor": self.cursor, "chosen": len(self.row_ids)}

    def load(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken; raise `DataError` if the text or the row length is another."""
        self.loader.load(state)
        self.cursor = state["cursor"]
