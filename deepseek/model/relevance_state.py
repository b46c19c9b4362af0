"""The state of relevance (`model/experts/relevance.py`) after the tokens so far."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RelevanceState:
    """The accumulated evidence that texts are about the domains of M modules.

    Attributes:
        sums_BM: decayed sums `[B, M+1]` of evidence in nats; the last column is the decayed count
            of tokens.
        last_B: last token of each row, -1 if there is none or it is padding, `[B]`.
    """

    sums_BM: Tensor
    last_B: Tensor

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> "RelevanceState":
        """Return the state with its rows selected, repeated or reordered by `change`."""
        return RelevanceState(change(self.sums_BM), change(self.last_B))
