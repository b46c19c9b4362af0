"""The dense feed-forward network."""

from torch import Tensor, nn
from torch.nn.functional import silu


class SwiGLU(nn.Module):
    """SwiGLU (arXiv:2002.05202): `down(silu(gate x) * up x)` maps `[..., D]` to `[..., D]`."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return y
