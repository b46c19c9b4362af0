"""The interface of a positional encoding."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from deepseek.kernels.bias.score_bias import ScoreBias
from deepseek.model.config import ModelConfig

if TYPE_CHECKING:
    from deepseek.model.context import ForwardContext


class PreparedPositions(Protocol):
    """Applies the positions of one forward pass to queries `[B, H, T, K]` and keys.

    Keys have the shape `[B, G, T, K]`. `windowed` is True for layers with a sliding window, which
    may have a rotary base of their own.
    """

    def __call__(
        self, query: Tensor, key: Tensor, windowed: bool = False
    ) -> tuple[Tensor, Tensor]: ...


def unchanged(
    query: Tensor,
    key: Tensor,
    windowed: bool = False,  # noqa: ARG001 - every layer is alike
) -> tuple[Tensor, Tensor]:
    """Return queries and keys as they are."""
    return query, key


class Positions:
    """The part of a positional encoding that the model owns.

    Both methods are called once per forward pass with the positions `[B, T]` of its tokens. This
    base class changes nothing: token order then follows from causal attention only (NoPE,
    arXiv:2305.19466), or from a score bias.
    """

    def __init__(self, config: ModelConfig) -> None:
        pass

    def embed(self, x_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Return the embeddings `[B, T, D]` with positions added."""
        return x_BTD

    def prepare(self, position_ids_BT: Tensor, dtype: torch.dtype) -> PreparedPositions:
        """Return the function that applies positions to queries and keys."""
        return unchanged


class ScoreBiasSource(nn.Module, ABC):
    """The part of a positional encoding that each layer owns.

    It maps the layer's input to the bias of its attention scores, or to None for a zero bias.
    """

    @abstractmethod
    def forward(self, x_BTD: Tensor, ctx: "ForwardContext", layer_idx: int) -> ScoreBias | None:
        """Return the bias of the new tokens; state of past tokens is in `ctx.cache`."""

    def each(self, x_1ND: Tensor, ctx: "ForwardContext", layer_idx: int) -> list[ScoreBias | None]:
        """Return the bias of each of the sequences that lie end to end in the only row.

        This base class computes one sequence after another.
        """
        parts = zip(x_1ND.split(ctx.lengths, dim=1), ctx.sequences, strict=True)
        return [self(x_1TD, sequence, layer_idx) for x_1TD, sequence in parts]

    @abstractmethod
    def state_bytes(self, length: int) -> int:
        """Return an upper bound on its bytes in the cache for one sequence of `length` tokens."""
