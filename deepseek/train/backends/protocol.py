"""What the loop asks of a backend."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

B = TypeVar("B")


class Backend(Protocol):
    """One of W processes that train together; with W = 1 every method but `save` and `load` returns what it is given.

    Attributes:
        main: whether this process writes metrics, plots and results.
        world: W.
    """

    @property
    def main(self) -> bool: ...
    @property
    def world(self) -> int: ...

    def shard(self, module: nn.Module, parts: list[nn.Module]) -> None:
        """Spread the parameters of `module` over the processes; those of each of `parts` are gathered as one."""

    def share(self, batch: B) -> B:
        """Return this process's rows of a batch that all processes have."""

    def weigh(self, tokens: int) -> tuple[float, int]:
        """Return the factor that makes the mean over processes of their mean losses the mean over all targets, and how
        many targets there are in all.
        """

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over processes."""

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""

    def barrier(self) -> None:
        """Wait for all processes."""

    def save(
        self,
        folder: Path,
        parameters: dict[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        optimizer: torch.optim.AdamW,
        meta: dict[str, Any],
    ) -> None:
        """Write a checkpoint that is either whole or absent."""

    def load(
        self,
        folder: Path,
        parameters: dict[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        optimizer: torch.optim.AdamW,
    ) -> dict[str, Any]:
        """Restore a checkpoint, whatever the number of processes that wrote it, and return its meta."""

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a parameter of which this process holds a part, complete."""
