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
        if rope_type == "default":
            self.inv_freq = _frequencies(config.rope_parameters["rope_theta"], config.head_dim)
        else:
            with torch.device("cpu"):  # also for a model that is built on the meta device
                self.inv_freq, self.scaling = ROPE_INIT_FUNCTIONS[rope_type](
                    config, torch.device("cpu")
                )

        self.local_inv_freq = (
            None
            if config.local_rope_theta is None
            else _frequencies(config.local_rope_theta, config.head_dim)
        )

    def prepare(self, position_ids_BT: Tensor, dtype: torch.dtype) -> "Rotation":
        """Return the rotation for positions `[B, T]`.

        Its tables are computed in fp32 and stored in `dtype`.
        """
        self.inv_freq = self.inv_freq.to(position_ids_BT.device)
        local = None
        if self.local_inv_freq is not None:
            self.local_inv_freq = self.local_inv_freq.to(position_ids_BT.device)
            local = _rotation(position_ids_BT, self.local_inv_freq, 1.0, dtype)
        rotation = _rotation(position_ids_BT, self.inv_freq, self.scaling, dtype)
        return rotation._replace(local=local)


def _frequencies(theta: float, head_dim: int) -> Tensor:
    """Return the rotary frequencies `[K/2]` of a base, also for a model on the meta device."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float, device="cpu") / head_dim
    return 1.0 / (theta**exponents)


def _rotation(
    position_ids_BT: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype
) -> "Rotation":
    angles = position_ids_BT[:, None, :, None].float() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return Rotation((angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype))


class Rotation(NamedTuple):
    """Cosine and sine tables `[B, 1, T, K]` that rotate queries and keys when called.

    Attributes:
        cos, sin: tables of layers without a window.
        local: tables of layers with a sliding window; None: the same ones.
    """

    cos: Tensor
    sin: Tensor
    local: "Rotation | None" = None

    def __call__(self, query: Tensor, key: Tensor, windowed: bool = False) -> tuple[Tensor, Tensor]:
        if windowed and self.local is not None:
            return self.local(query, key)
        return self._rotate(query), self._rotate(key)

    def _rotate(self, heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * self.cos + torch.cat((-second, first), dim=-1) * self.sin
