"""What a positional encoding must offer."""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from deepseek.kernels.bias.score_bias import ScoreBias
from deepseek.model.config import ModelConfig

if TYPE_CHECKING:
    from deepseek.model.context import ForwardContext


class PreparedPositions(Protocol):
    """Positions of one forward pass: maps queries `[B, H, T, K]` and keys `[B, G, T, K]` to positioned ones."""

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]: ...


class Positions:
    """What the model owns; both methods are called once per forward pass with the positions `[B, T]` of its tokens.

    As it stands it leaves everything as it is: the order is told by causal attention alone (NoPE, arXiv:2305.19466) or
    by the scores.
    """

    def __init__(self, config: ModelConfig) -> None:
        pass

    def embed(self, x_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Return the embeddings with what the encoding adds to them."""
        return x_BTD

    def prepare(self, position_ids_BT: Tensor, dtype: torch.dtype) -> PreparedPositions:
        """Return what is done to queries and keys."""
        return lambda query, key: (query, key)


class ScoreBiasSource(Protocol):
    """What a layer owns, a module: maps the layer's input to the bias of its scores, or to None where it is zero."""

    def __call__(self, x_BTD: Tensor, ctx: "ForwardContext", layer_idx: int) -> ScoreBias | None: ...

    def state_bytes(self, length: int) -> int:
        """Return the most bytes that it keeps in the cache for one sequence of `length` tokens."""
