"""The dense feed-forward networks."""

from torch import Tensor, nn
from torch.nn.functional import gelu, silu


class SwiGLU(nn.Module):
    """SwiGLU (arXiv:2002.05202): `down(silu(gate x) * up x)` maps `[..., D]` to `[..., D]`."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return y

    def activation(self, gates: Tensor) -> Tensor:
        """Return the activation of the gates."""
        return silu(gates)


class GeGLU(SwiGLU):
    """GeGLU (arXiv:2002.05202) with the tanh approximation of GELU."""

    def activation(self, gates: Tensor) -> Tensor:
        return gelu(gates, approximate="tanh")


FEED_FORWARD: dict[str, type[SwiGLU]] = {"gelu_pytorch_tanh": GeGLU, "silu": SwiGLU}
"""`ModelConfig.hidden_act` -> the network."""
