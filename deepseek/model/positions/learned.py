"""Learned absolute positions, and the additive form of dynamic positional encoding."""

import math

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.model.config import ModelConfig
from deepseek.model.positions.protocol import Positions


class LearnedPositions(nn.Embedding, Positions):
    """Adds a learned vector of each position, up to `max_position_embeddings`, to the embeddings
    (GPT-2).
    """

    def __init__(self, config: ModelConfig) -> None:
        self.initializer_range = config.initializer_range
        super().__init__(config.max_position_embeddings, config.hidden_size)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.initializer_range)

    def embed(self, x_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Return embeddings with positions added; raise `ConfigError` where a position has no
        vector.
        """
        last = int(position_ids_BT.max())
        if last >= self.num_embeddings:
            raise ConfigError(
                f"Position {last} is beyond max_position_embeddings={self.num_embeddings}, and learned positions end "
                "there; shorten the text or use positional_encoding='dpe' or 'rope'."
            )
        return x_BTD + self(position_ids_BT)


class DynamicPositionalEncoding(nn.Module):
    """Adds to each token a vector of its position, scaled by what the token is: the additive form,
    usable alone.

        dpe(x, pos) = x + (1 + tanh(x W)) * (sinusoid(pos) + P[pos])

    P `[max_len, D]` is the learned position matrix and starts at zero, as W does, so that the
    module starts as the sinusoids of arXiv:1706.03762 and goes on beyond `max_len`, where the last
    row of P holds for all positions. The model itself uses the relative form,
    `positional_encoding="dpe"` (see `dynamic.py`).

    Raises:
        ConfigError: `d_model` is odd, or a size is not positive.
    """

    def __init__(self, d_model: int, max_len: int = 512) -> None:
        super().__init__()
        if d_model < 2 or d_model % 2 or max_len < 1:
            raise ConfigError(
                f"d_model={d_model} must be even and positive, and max_len={max_len} positive."
            )
        self.gate = nn.Linear(d_model, d_model, bias=False)
        self.positions = nn.Parameter(torch.zeros(max_len, d_model))
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor, pos_ids: Tensor) -> Tensor:
        """Return x with its positions added.

        Args:
            x: embeddings `[batch, seq, d_model]`.
            pos_ids: integer positions `[batch, seq]` or `[seq]`, from 0 on.

        Raises:
            ConfigError: a position is negative, boolean or no integer.
        """
        if pos_ids.is_floating_point() or pos_ids.is_complex() or pos_ids.dtype == torch.bool:
            raise ConfigError(
                f"pos_ids are of dtype {pos_ids.dtype}; give integer positions, from 0 on."
            )
        if pos_ids.numel() and int(pos_ids.min()) < 0:
            raise ConfigError(f"pos_ids hold {int(pos_ids.min())}; positions count from 0 on.")
        added = (
            sinusoids(pos_ids, x.shape[-1]).to(x.dtype)
            + self.positions[pos_ids.clamp(max=len(self.positions) - 1)]
        )
        return x + (1 + self.gate(x).tanh()) * added


def sinusoids(pos_ids: Tensor, width: int) -> Tensor:
    """Return sines and cosines `[..., width]` of positions, wavelengths from 2 pi to 10,000 times
    that.
    """
    exponents = torch.arange(0, width, 2, device=pos_ids.device).float() / width
    angles = pos_ids[..., None].float() * torch.exp(-math.log(10_000) * exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
