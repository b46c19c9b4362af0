"""How a model knows the order of its tokens. One protocol, one table; a new kind is one file and one row."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from deepseek.model.config import ModelConfig
from deepseek.model.positions.rope import Rope


class PreparedPositions(Protocol):
    """Positions of one forward pass: maps queries `[B, H, T, K]` and keys `[B, G, T, K]` to positioned ones."""

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]: ...


class Positions(Protocol):
    """A positional encoding; `prepare` is called once per forward pass with the positions `[B, T]` of its tokens."""

    def prepare(self, position_ids_BT: Tensor, dtype: torch.dtype) -> PreparedPositions: ...


class NoPositions:
    """No encoding at all: causal attention alone tells the order (NoPE, arXiv:2305.19466)."""

    def __init__(self, config: ModelConfig) -> None:
        pass

    def prepare(self, position_ids_BT: Tensor, dtype: torch.dtype) -> PreparedPositions:
        return lambda query, key: (query, key)


POSITIONS: dict[str, Callable[[ModelConfig], Positions]] = {"none": NoPositions, "rope": Rope}
