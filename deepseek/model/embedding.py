"""Token embeddings that are scaled by the root of their width."""

import math

from torch import Tensor, nn


class ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies its rows by the root of their width (Gemma)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in the base class
        # The factor has the precision of the weights, as in `transformers`.
        scale = self.weight.new_tensor(math.sqrt(self.embedding_dim))
        return super().forward(input) * scale
