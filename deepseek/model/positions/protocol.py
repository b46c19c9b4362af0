"""What a positional encoding must offer."""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from deepseek.kernels.score_bias import ScoreBias

if TYPE_CHECKING:
    from deepseek.model.context import ForwardContext


class PreparedPositions(Protocol):
    """Positions of one forward pass: maps queries `[B, H, T, K]` and keys `[B, G, T, K]` to positioned ones."""

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]: ...


class Positions(Protocol):
    """What the model owns; both are called once per forward pass with the positions `[B, T]` of its tokens."""

    def embed(self, x_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Return the embeddings with what the encoding adds to them."""
        ...

    def prepare(self, position_ids_BT: Tensor, dtype: torch.dtype) -> PreparedPositions: ...


class ScoreBiasSource(Protocol):
    """What a layer owns, a module: maps the layer's input to the bias of its scores, or to None where it is zero."""

    def __call__(self, x_BTD: Tensor, ctx: "ForwardContext", layer_idx: int) -> ScoreBias | None: ...
