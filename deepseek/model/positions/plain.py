"""No encoding in the stream: the order is told by causal attention alone (NoPE, arXiv:2305.19466) or by the scores."""

import torch
from torch import Tensor

from deepseek.model.config import ModelConfig
from deepseek.model.positions.protocol import PreparedPositions


class PlainPositions:
    """Leaves embeddings, queries and keys as they are."""

    def __init__(self, config: ModelConfig) -> None:
        pass

    def embed(self, x_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        return x_BTD

    def prepare(self, position_ids_BT: Tensor, dtype: torch.dtype) -> PreparedPositions:
        return lambda query, key: (query, key)
