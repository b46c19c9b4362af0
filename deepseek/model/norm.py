"""Root-mean-square normalisation (arXiv:1910.07467)."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalise `[..., D]` to unit root mean square in fp32, then scale by a learned weight.

    Args:
        width: size D.
        eps: added to the mean square.
        offset: scale by 1 + weight instead, which starts at zero (Gemma); default False.
    """

    def __init__(self, width: int, eps: float, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if offset else torch.ones(width))
        self.eps = eps
        self.offset = offset

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (wide * self.scale()).to(hidden.dtype)
        return self.weight * wide.to(hidden.dtype)

    def scale(self) -> Tensor:
        """Return the factors `[D]` in fp32."""
        return self.weight.float() + 1 if self.offset else self.weight.float()
