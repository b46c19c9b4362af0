"""Learned absolute positions (GPT-2), and the additive form of dynamic positional encoding."""

import math

import torch
from torch import Tensor, nn

from deepseek import checks
from deepseek.errors import ConfigError
from deepseek.model.config import ModelConfig
from deepseek.model.field_checks import size
from deepseek.model.inputs import MAX_POSITION
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
        d_model = size("d_model", d_model)
        max_len = size("max_len", max_len)
        if d_model % 2:
            raise ConfigError(f"d_model={d_model} must be an even number.")
        self.gate = nn.Linear(d_model, d_model, bias=False)
        self.positions = nn.Parameter(torch.zeros(max_len, d_model))
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor, pos_ids: Tensor) -> Tensor:
        """Return x with its positions added.

        Args:
            x: embeddings `[batch, seq, d_model]`, or `[seq, d_model]`.
            pos_ids: integer positions `[batch, seq]` or `[seq]`, counted from 0.

        Raises:
            ConfigError: x is not floating point, of the module's dtype and width, or positions are
                negative, not integers, or of another shape.
        """
        width = self.positions.shape[1]
        checks.tensor("x", x, "real", dims=(2, 3), width=width)
        checks.tensor("pos_ids", pos_ids, "whole", dims=(1, 2))
        checks.same_device(x=x, pos_ids=pos_ids, weights=self.positions)
        if not torch.is_autocast_enabled(x.device.type):
            checks.alike(x=x, weights=self.gate.weight)
        one_row = x.shape[-2:-1]
        if tuple(pos_ids.shape) not in {tuple(one_row), (1, *one_row), tuple(x.shape[:-1])}:
            checks.shape("pos_ids", pos_ids, x.shape[:-1], "[batch, seq]")
        checks.within("pos_ids", pos_ids, 0, MAX_POSITION, "positions")
        pos_ids = pos_ids.long()  # uint8 would be read as a mask
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
