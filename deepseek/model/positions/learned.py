"""Learned absolute positions (GPT-2), and the additive form of dynamic positional encoding."""

import math

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.model.config import ModelConfig
from deepseek.model.positions.protocol import Positions


class LearnedPositions(nn.Embedding, Positions):
    """Adds a learned vector per position to the embeddings, up to `max_position_embeddings`."""

    def __init__(self, config: ModelConfig) -> None:
        self.initializer_range = config.initializer_range
        super().__init__(config.max_position_embeddings, config.hidden_size)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.initializer_range)

    def embed(self, x_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Return the embeddings with position vectors added.

        Raises:
            ConfigError: a position is beyond `max_position_embeddings`.
        """
        last = int(position_ids_BT.max())
        if last >= self.num_embeddings:
            raise ConfigError(
                f"Position {last} is beyond max_position_embeddings={self.num_embeddings}, and "
                "learned positions end there; shorten the text or use positional_encoding='dpe' or "
                "'rope'."
            )
        return x_BTD + self(position_ids_BT)


class DynamicPositionalEncoding(nn.Module):
    """Adds a position vector to each token, scaled by a gate that reads the token.

        dpe(x, pos) = x + (1 + tanh(x W)) * (sinusoid(pos) + P[pos])

    The position matrix P `[max_len, D]` and W start at zero, so that the module starts as the
    sinusoidal encoding of arXiv:1706.03762. Positions from `max_len` on use the last row of P. This
    is the additive form, a stand-alone module; the model uses the relative form,
    `positional_encoding="dpe"` (see `dynamic.py`).

    Args:
        d_model: width D of the embeddings, an even number.
        max_len: number of learned position vectors (default 512).

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
            pos_ids: integer positions `[batch, seq]` or `[seq]`, counted from 0.

        Raises:
            ConfigError: positions are negative or not integers.
        """
        if pos_ids.is_floating_point() or pos_ids.is_complex() or pos_ids.dtype == torch.bool:
            raise ConfigError(
                f"pos_ids are of dtype {pos_ids.dtype}; give integer positions, from 0 on."
            )
        if pos_ids.numel() and int(pos_ids.min()) < 0:
            raise ConfigError(f"pos_ids hold {int(pos_ids.min())}; positions count from 0 on.")
        position_vectors = (
            sinusoids(pos_ids, x.shape[-1]).to(x.dtype)
            + self.positions[pos_ids.clamp(max=len(self.positions) - 1)]
        )
        return x + (1 + self.gate(x).tanh()) * position_vectors


def sinusoids(pos_ids: Tensor, width: int) -> Tensor:
    """Return the sinusoidal encoding `[..., width]` of positions (arXiv:1706.03762, section 3.5).

    Wavelengths range from 2 pi to 10,000 * 2 pi.
    """
    exponents = torch.arange(0, width, 2, device=pos_ids.device).float() / width
    angles = pos_ids[..., None].float() * torch.exp(-math.log(10_000) * exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
