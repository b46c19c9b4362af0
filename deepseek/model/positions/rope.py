"""Rotary position embedding (arXiv:2104.09864) and its static length scalings."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deepseek.model.config import ModelConfig
from deepseek.model.positions.protocol import Positions


class Rope(Positions):
    """Rotates queries and keys by angles proportional to their position.

    Frequencies of the scaled variants ("linear", "llama3", "yarn") come from `transformers`, so
    that results agree with it for its checkpoints.
    """

    def __init__(self, config: ModelConfig) -> None:
        assert config.rope_parameters is not None and config.head_dim is not None
        self.scaling = 1.0
        rope_type = config.rope_parameters.get("rope_type", "default")
        with torch.device("cpu"):  # a model built on the meta device still needs real frequencies
            if rope_type == "default":
                exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
                self.inv_freq = 1.0 / (config.rope_parameters["rope_theta"] ** exponents)
            else:
                self.inv_freq, self.scaling = ROPE_INIT_FUNCTIONS[rope_type](
                    config, torch.device("cpu")
                )

    def prepare(self, position_ids_BT: Tensor, dtype: torch.dtype) -> "Rotation":
        """Return the rotation for positions `[B, T]`.

        Its tables are computed in fp32 and stored in `dtype`.
        """
        self.inv_freq = self.inv_freq.to(position_ids_BT.device)
        angles = position_ids_BT[:, None, :, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return Rotation(
            (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)
        )


class Rotation(NamedTuple):
    """Cosine and sine tables `[B, 1, T, K]` that rotate queries and keys when called."""

    cos: Tensor
    sin: Tensor

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self._rotate(query), self._rotate(key)

    def _rotate(self, heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * self.cos + torch.cat((-second, first), dim=-1) * self.sin
