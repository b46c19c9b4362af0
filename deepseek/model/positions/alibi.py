"""Attention with linear biases (arXiv:2108.12409)."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepseek.kernels.bias.score_bias import ScoreBias
from deepseek.model.config import ModelConfig
from deepseek.model.positions.protocol import ScoreBiasSource

if TYPE_CHECKING:
    from deepseek.model.context import ForwardContext


class AlibiBias(ScoreBiasSource):
    """A score bias that falls linearly with the distance between query and key.

    Softmax ignores a constant per query, so the bias depends on the key only: index times slope.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.slopes = slopes(config.num_attention_heads)

    def forward(self, x_BTD: Tensor, ctx: "ForwardContext", layer_idx: int) -> ScoreBias:
        slopes_H = torch.tensor(self.slopes, dtype=torch.double, device=x_BTD.device)
        return ScoreBias(key_BHS=slopes_H[:, None] * ctx.places_BS[:, None].double())

    def state_bytes(self, length: int) -> int:
        return 0


def slopes(heads: int) -> list[float]:
    """Return the slope of each head (arXiv:2108.12409, section 3).

    The slopes are powers of 2 down to 2^-8. If the number of heads is not a power of 2, the
    remaining heads get slopes in between.
    """
    whole = 2 ** int(math.log2(heads))
    series = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    between = [2 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return series + between
