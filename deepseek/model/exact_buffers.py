"""Modules whose buffers keep fp32 when the model is cast to another dtype."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose floating-point buffers move with the model but keep every bit of fp32.

    `model.to(torch.bfloat16)`, `model.half()` and their like cast the weights of other modules.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        buffers = self.named_buffers(recurse=False)
        exact = {name: buffer for name, buffer in buffers if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            # The moved buffer may have lost bits in a cast; one on the meta device has no values.
            source = moved if buffer.is_meta else buffer
            setattr(self, name, source.to(moved.device, torch.float32))
        return self
