"""The feed-forward networks of an expert module."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu


class ExpertLayer(nn.Module):
    """A SwiGLU with a fused gate and up projection `[2F, D]` whose output is initially zero.

    It has no norm weight, because the columns of `gate_up_proj` can scale its input as well.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(hidden_size, width))
        nn.init.normal_(self.gate_up_proj, std=hidden_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., D]`."""
        gate, up = linear(x, self.gate_up_proj).chunk(2, dim=-1)
        return linear(silu(gate) * up, self.down_proj)

    @torch.no_grad()
    def copy_rows(self, gate_FD: Tensor, up_FD: Tensor, seed: int) -> None:
        """Initialise from the base's feed-forward network: all its rows, or a random sample.

        Args:
            gate_FD: gate projection of the base layer.
            up_FD: up projection of the base layer.
            seed: seed of the sample.
        """
        width = self.down_proj.shape[1]
        rows = (
            torch.randperm(len(gate_FD), generator=torch.Generator().manual_seed(seed))[:width]
            .sort()
            .values
        )
        rows = rows.to(gate_FD.device)
        self.gate_up_proj.copy_(torch.cat([gate_FD[rows], up_FD[rows]]))


class ExpertLayers(nn.ModuleDict):
    """The expert layers of a module, keyed by layer index."""

    def in_order(self) -> list[ExpertLayer]:
        """Return the layers from the lowest to the highest."""
        return [part for part in self.values() if isinstance(part, ExpertLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(parameter.nbytes for parameter in self.parameters())
