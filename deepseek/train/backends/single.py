"""One process that holds everything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepseek.train.state import load_training, save_training

B = TypeVar("B")


class Single:
    """The backend where nobody else takes part."""

    main, world = True, 1

    def shard(self, module: nn.Module, parts: list[nn.Module]) -> None:
        return None

    def share(self, batch: B) -> B:
        return batch

    def weigh(self, tokens: int) -> tuple[float, int]:
        return 1.0, tokens

    def mean(self, values: Tensor) -> Tensor:
        return values

    def any(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        return None

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def save(
        self,
        folder: Path,
        parameters: dict[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        optimizer: torch.optim.AdamW,
        meta: dict[str, Any],
    ) -> None:
        save_training(folder, parameters, optimizer, meta, buffers)

    def load(
        self,
        folder: Path,
        parameters: dict[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        optimizer: torch.optim.AdamW,
    ) -> dict[str, Any]:
        return load_training(folder, parameters, optimizer, buffers)
