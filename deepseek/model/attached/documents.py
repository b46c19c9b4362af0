"""Packed rows as one row per document, for models that carry state across documents."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of packed rows `[B, T]`, as rows `[N, L]` that are padded on the right.

    A causal model's output at a token does not depend on padding after it.

    Attributes:
        shape: B and T.
        slots_NL: index of each token among the B * T tokens; padding has that of its document's
            last token.
        real_NL: False at padding.
    """

    shape: tuple[int, int]
    slots_NL: Tensor
    real_NL: Tensor

    @staticmethod
    def of(position_ids_BT: Tensor) -> "Documents":
        """Return the documents of rows without padding (see `context.document_ids`).

        Args:
            position_ids_BT: positions; a document starts where they do not increase by 1.
        """
        batch, length = position_ids_BT.shape
        starts_BT = torch.diff(position_ids_BT, dim=-1, prepend=position_ids_BT[:, :1] - 1) != 1
        starts_BT[:, 0] = True
        first_N = starts_BT.flatten().nonzero()[:, 0]
        end = torch.tensor([batch * length], device=first_N.device)
        lengths_N = torch.diff(first_N, append=end)
        offsets_L = torch.arange(int(lengths_N.max()), device=first_N.device)
        real_NL = offsets_L < lengths_N[:, None]
        slots_NL = first_N[:, None] + offsets_L.minimum(lengths_N[:, None] - 1)
        return Documents((batch, length), slots_NL, real_NL)

    def split(self, packed_BT: Tensor) -> Tensor:
        """Return values `[B, T, ...]` by document, `[N, L, ...]`."""
        return packed_BT.flatten(0, 1)[self.slots_NL]

    def join(self, split_NL: Tensor) -> Tensor:
        """Return values `[N, L, ...]` as packed rows `[B, T, ...]`."""
        # Documents follow each other in their rows, so boolean indexing returns tokens in order.
        return split_NL[self.real_NL].unflatten(0, self.shape)
