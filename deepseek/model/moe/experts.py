"""A pool of routed experts."""

import torch
from torch import Tensor, nn

from deepseek.kernels.moe.grouped_mm import mix_experts


class Experts(nn.Module):
    """E SwiGLU feed-forward networks of width F, stored fused as in `transformers` 5.

    A pool belongs to one layer, or several layers share it (`expert_sharing`). The model registers
    a shared pool once.

    Parameters:
        gate_up_proj: `[E, 2F, D]`, the gate's rows first.
        down_proj: `[E, D, F]`.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_dim))
        for parameter in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x_ND: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """Return the weighted sum of expert outputs of each token `[N, D]`.

        Args:
            x_ND: inputs.
            ids_NA: expert ids; slots with id E are unused.
            weights_NA: expert weights.
        """
        return mix_experts(x_ND, self.gate_up_proj, self.down_proj, ids_NA, weights_NA)
