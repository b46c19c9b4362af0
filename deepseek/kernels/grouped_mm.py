"""The experts of a mixture: each token through its own few feed-forward networks.

`mix_experts` is the one entry. `mix_experts_reference` says what it computes; the equivalence test holds them together.
Expert ids equal to E mark slots that take no part.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from deepseek.kernels import segments


def mix_experts_reference(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor
) -> Tensor:
    """Return `y_n = sum over slots a of weights[n, a] * E_{ids[n, a]}(x_n)`, `[N, D]`, one expert after the other."""
    y_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, weights_NA.dtype))
    for expert in range(len(down_EDF)):
        tokens, slots = torch.where(ids_NA == expert)
        gate, up = (x_ND[tokens] @ gate_up_E2FD[expert].T).chunk(2, dim=-1)
        out = (silu(gate) * up) @ down_EDF[expert].T
        y_ND = y_ND.index_add(0, tokens, out * weights_NA[tokens, slots, None])
    return y_ND.to(x_ND.dtype)


def mix_experts_grouped(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor
) -> Tensor:
    """The same as two grouped matrix products with static shapes and no device-to-host copy: the path of a GPU."""
    num_experts, num_slots = len(down_EDF), ids_NA.shape[1]
    ids_S, order_S = ids_NA.flatten().sort(stable=True)
    ends_E = torch.searchsorted(ids_S, torch.arange(num_experts, device=ids_S.device), right=True).int()
    idle_S1 = (ids_S == num_experts)[:, None]
    # grouped_mm leaves rows past the last end uninitialised, in its gradients too, and NaN times 0 is NaN: so each
    # of its inputs and outputs is masked.
    x_SD = x_ND[order_S // num_slots].to(gate_up_E2FD.dtype).masked_fill(idle_S1, 0)
    gate, up = grouped_mm(x_SD, gate_up_E2FD.mT, offs=ends_E).masked_fill(idle_S1, 0).chunk(2, dim=-1)
    hidden_SF = silu(gate) * up * weights_NA.flatten()[order_S, None].to(gate.dtype)
    out_SD = grouped_mm(hidden_SF.masked_fill(idle_S1, 0), down_EDF.mT, offs=ends_E).masked_fill(idle_S1, 0)
    back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    return out_SD[back_S].unflatten(0, ids_NA.shape).sum(1).to(x_ND.dtype)


def mix_experts_everywhere(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor
) -> Tensor:
    """The same with every expert at every token, in plain products: what a graph for other runtimes can hold."""
    weights_NE = weights_NA.new_zeros(x_ND.shape[0], len(down_EDF) + 1).scatter_add(1, ids_NA, weights_NA)[:, :-1]
    gate, up = (x_ND @ gate_up_E2FD.mT).chunk(2, dim=-1)
    return (((silu(gate) * up) @ down_EDF.mT) * weights_NE.T[..., None]).sum(0).to(x_ND.dtype)


def mix_experts(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
    """Return each token's weighted sum of expert outputs by the fastest way on its device.

    Args:
        x_ND: tokens `[N, D]`.
        gate_up_E2FD: gate and up projections `[E, 2F, D]`, the gate's rows first.
        down_EDF: down projections `[E, D, F]`.
        ids_NA: expert of each slot `[N, A]`, E where the slot takes no part; an expert at most once a token.
        weights_NA: weight of each slot, fp32 `[N, A]`.

    Returns:
        `[N, D]` in the dtype of x; differentiable in x, both projections and the weights.
    """
    if torch.compiler.is_exporting():
        return mix_experts_everywhere(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA)
    if x_ND.device.type != "cpu" or segments.is_slow(gate_up_E2FD, ids_NA):
        return mix_experts_grouped(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA)
    return segments.mix_experts(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA)
