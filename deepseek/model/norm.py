"""Root-mean-square normalisation (arXiv:1910.07467)."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalise `[..., D]` to unit root mean square in fp32, then scale by a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)
