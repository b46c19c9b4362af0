"""Recorded weights of experts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek.model.experts.module import ExpertModule


@dataclass(eq=False)  # traces of nested and concurrent blocks are told apart by identity
class Trace:
    """Recorded expert weights over several forward passes (see `ExpertSet.record`).

    Attributes:
        parts: (module name, layer) -> the weights `[B, T]` of each pass, on the CPU.
    """

    parts: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the recorded modules, sorted."""
        return tuple(sorted({name for name, _ in self.parts}))

    def weights(self, name: str) -> Tensor:
        """Return the weights `[B, T]` of module `name`, averaged over its layers."""
        return torch.stack(
            [torch.cat(parts, dim=1) for (owner, _), parts in self.parts.items() if owner == name]
        ).mean(0)

    def add(self, modules: Sequence[ExpertModule], layer_idx: int, weights_BTM: Tensor) -> None:
        """Append the weights `[B, T, M]` of one layer in one forward pass."""
        for module, weights_BT in zip(
            modules, weights_BTM.detach().float().cpu().unbind(-1), strict=True
        ):
            self.parts.setdefault((module.name, layer_idx), []).append(weights_BT)
