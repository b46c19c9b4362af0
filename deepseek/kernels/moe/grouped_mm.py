"""Mixture of experts: each token passes through the few feed-forward networks that it is routed to.

`mix_experts` is the entry point. `mix_experts_reference` defines the result; the equivalence test
compares them. An expert id of E marks an idle slot.

On a CPU, slots are sorted by expert, with one matrix product per expert and projection; an expert's
rows are gathered and multiplied while they are in the cache. Where bf16 products are emulated, an
expert's weights are converted to fp32 just before use.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from deepseek.device.choose import fast_dtype
from deepseek.device.cpu import has_bfloat16
from deepseek.kernels.moe.alignment import aligned, is_aligned
from deepseek.kernels.numba import openmp


def mix_experts_reference(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor
) -> Tensor:
    """Return `y_n = sum over slots a of weights[n, a] * E_{ids[n, a]}(x_n)`, `[N, D]`, computed one
    expert after the other.
    """
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
    """Compute `mix_experts` as two grouped matrix products, the path for GPUs.

    Shapes are static, and nothing is copied from the device to the host. Widths that `grouped_mm`
    refuses are padded with zeros, which costs a copy of the weights.
    """
    if not is_aligned(gate_up_E2FD, down_EDF):
        x, gate_up, down = aligned(x_ND, gate_up_E2FD, down_EDF)
        return mix_experts_grouped(x, gate_up, down, ids_NA, weights_NA)[:, : x_ND.shape[1]]
    num_experts = len(down_EDF)
    num_slots = ids_NA.shape[1]
    ids_S, order_S = ids_NA.flatten().sort(stable=True)
    ends_E = torch.searchsorted(
        ids_S, torch.arange(num_experts, device=ids_S.device), right=True
    ).int()
    idle_S1 = (ids_S == num_experts)[:, None]
    # grouped_mm leaves rows past the last end uninitialised, in its gradients too. Weights of 0 do
    # not help, because NaN times 0 is NaN, so each of its inputs and outputs is masked.
    x_SD = x_ND[order_S // num_slots].to(gate_up_E2FD.dtype).masked_fill(idle_S1, 0)
    gate, up = (
        grouped_mm(x_SD, gate_up_E2FD.mT, offs=ends_E).masked_fill(idle_S1, 0).chunk(2, dim=-1)
    )
    hidden_SF = silu(gate) * up * weights_NA.flatten()[order_S, None].to(gate.dtype)
    out_SD = grouped_mm(hidden_SF.masked_fill(idle_S1, 0), down_EDF.mT, offs=ends_E).masked_fill(
        idle_S1, 0
    )
    back_S = torch.empty_like(order_S).scatter_(
        0, order_S, torch.arange(len(order_S), device=order_S.device)
    )
    return out_SD[back_S].unflatten(0, ids_NA.shape).sum(1).to(x_ND.dtype)


def mix_experts_everywhere(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor
) -> Tensor:
    """Compute `mix_experts` by applying every expert to every token.

    It consists of plain products, which exported graphs can represent.
    """
    weights_NE = weights_NA.new_zeros(x_ND.shape[0], len(down_EDF) + 1).scatter_add(
        1, ids_NA, weights_NA
    )[:, :-1]
    gate, up = (x_ND @ gate_up_E2FD.mT).chunk(2, dim=-1)
    return (((silu(gate) * up) @ down_EDF.mT) * weights_NE.T[..., None]).sum(0).to(x_ND.dtype)


def mix_experts(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor
) -> Tensor:
    """Return each token's weighted sum of expert outputs, by the fastest path on its device.

    Args:
        x_ND: tokens `[N, D]`.
        gate_up_E2FD: gate and up projections `[E, 2F, D]`, the gate's rows first.
        down_EDF: down projections `[E, D, F]`.
        ids_NA: expert of each slot `[N, A]`, E for an idle slot; a token has an expert at most
            once.
        weights_NA: weight of each slot, fp32 `[N, A]`.

    Returns:
        `[N, D]` in the dtype of x; differentiable in x, both projections and the weights.
    """
    if torch.compiler.is_exporting():
        return mix_experts_everywhere(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA)
    if x_ND.device.type != "cpu" or _is_slow(gate_up_E2FD, down_EDF, ids_NA):
        return mix_experts_grouped(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA)
    return mix_experts_sorted(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA)


# Up to this many slots per expert, on average, reading the weights takes longer than the
# arithmetic.
FEW = 8
# Expert pools with fewer parameters are not worth the seconds that compiling a kernel takes at its
# first use.
SMALL = 1 << 18


def mix_experts_sorted(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor
) -> Tensor:
    """Compute `mix_experts` with the slots sorted by expert, in compiled kernels where they are
    faster: the path for CPUs.
    """
    tensors = (x_ND, gate_up_E2FD, down_EDF, weights_NA)
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    ):
        y_ND, _ = _mix_op(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA)
        return y_ND
    return _forward(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA, None)


def _is_slow(gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor) -> bool:
    """Whether grouped products are faster than the CPU path for training these experts.

    They are if bf16 products are native, because the kernels for few tokens convert the weights to
    fp32, and if the weights need no padding.
    """
    native = gate_up_E2FD.dtype == torch.bfloat16 and has_bfloat16()
    trained = torch.is_grad_enabled() and gate_up_E2FD.requires_grad
    few = ids_NA.shape[0] > 1 and _has_few_tokens(ids_NA, len(gate_up_E2FD))
    return native and trained and few and is_aligned(gate_up_E2FD, down_EDF)


def _has_few_tokens(ids_NA: Tensor, num_experts: int) -> bool:
    """Whether the experts have so few tokens that reading their weights dominates."""
    return ids_NA.numel() <= FEW * num_experts


def _has_kernel(ids_NA: Tensor, *weights: Tensor) -> bool:
    """Whether a compiled kernel supports these weights, whose rows it reads in fours, and is faster
    than torch's operators.
    """
    dtypes = (torch.float32, torch.bfloat16)
    if ids_NA.numel() == 0 or sum(t.numel() for t in weights) < SMALL:
        return False
    if not all(
        t.dtype == weights[0].dtype in dtypes and t.is_contiguous() and t.shape[1] % 4 == 0
        for t in weights
    ):
        return False
    if _has_few_tokens(ids_NA, len(weights[0])):
        return openmp.runtime() is not None
    return _compute_dtype(weights[0].dtype) == torch.float32 and openmp.has_sgemm()


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the matrix products for inputs of `dtype`."""
    return dtype if dtype in (torch.float32, torch.float64) else fast_dtype("cpu")


def _saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the projections saved for the backward pass: at least fp32 on every
    path.
    """
    return torch.promote_types(dtype, torch.float32)


def _segments(ids_NA: Tensor, num_experts: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Return the slots sorted by expert `[N * A]`, and (expert, start, stop) of every expert with
    slots.
    """
    ids_S = ids_NA.flatten()
    counts = torch.bincount(ids_S, minlength=num_experts)[:num_experts]
    spans = zip(counts.tolist(), counts.cumsum(0).tolist(), strict=True)
    bounds = [(expert, stop - count, stop) for expert, (count, stop) in enumerate(spans) if count]
    return ids_S.argsort(stable=True), bounds


def _forward(
    x_ND: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    ids_NA: Tensor,
    weights_NA: Tensor,
    proj_SP: Tensor | None,
) -> Tensor:
    """Return y `[N, D]`; fill `proj_SP`, if any, with the gate and up projections of the sorted
    slots.
    """
    if _has_kernel(ids_NA, gate_up_E2FD, down_EDF):
        return _forward_compiled(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA, proj_SP)
    dtype = _compute_dtype(x_ND.dtype)
    x = x_ND.to(dtype)
    (order_S, segments) = _segments(ids_NA, len(down_EDF))
    token_S = order_S // ids_NA.shape[1]
    out_SD = x.new_empty(len(order_S), x.shape[1])
    for expert, start, stop in segments:
        proj = x[token_S[start:stop]] @ gate_up_E2FD[expert].to(dtype).T
        if proj_SP is not None:
            proj_SP[start:stop] = proj
        gate, up = proj.chunk(2, dim=-1)
        out_SD[start:stop] = silu(gate).mul_(up) @ down_EDF[expert].to(dtype).T
    return _combine(out_SD, order_S, segments, weights_NA).to(x_ND.dtype)


def _combine(
    out_SD: Tensor, order_S: Tensor, segments: list[tuple[int, int, int]], weights_NA: Tensor
) -> Tensor:
    """Return each token's weighted sum `[N, D]` over the rows of its slots, which are sorted by
    expert, idle ones last.
    """
    out_SD[segments[-1][2] if segments else 0 :] = 0
    back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S)))
    # `index_add_` of the experts' rows takes ten times as long as this product.
    return (weights_NA[:, None].to(out_SD.dtype) @ out_SD[back_S].unflatten(0, weights_NA.shape))[
        :, 0
    ]


def _forward_compiled(
    x_ND: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    ids_NA: Tensor,
    weights_NA: Tensor,
    proj_SP: Tensor | None,
) -> Tensor:
    # Imported here because they import numba, which nothing else needs.
    from deepseek.kernels.moe import few_tokens, many_tokens

    kernel = few_tokens if _has_few_tokens(ids_NA, len(down_EDF)) else many_tokens
    x = x_ND.float().contiguous()
    ids = ids_NA.contiguous()
    weights = weights_NA.float().contiguous()
    return kernel.forward(x, gate_up_E2FD, down_EDF, ids, weights, proj_SP).to(x_ND.dtype)


@torch.library.custom_op("deepseek::mix_experts", mutates_args=())
def _mix_op(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y, and the gate and up projections `[N * A, 2F]` for the backward pass."""
    proj_SP = torch.empty(ids_NA.numel(), gate_up_E2FD.shape[1], dtype=_saved_dtype(x_ND.dtype))
    return _forward(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA, proj_SP), proj_SP


@_mix_op.register_fake
def _(
    x_ND: Tensor, gate_up_E2FD: Tensor, _down_EDF: Tensor, ids_NA: Tensor, _weights_NA: Tensor
) -> tuple[Tensor, Tensor]:
    proj_SP = x_ND.new_empty(ids_NA.numel(), gate_up_E2FD.shape[1], dtype=_saved_dtype(x_ND.dtype))
    return torch.empty_like(x_ND, memory_format=torch.contiguous_format), proj_SP


@torch.library.custom_op("deepseek::mix_experts_backward", mutates_args=())
def _backward_op(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    ids_NA: Tensor,
    weights_NA: Tensor,
    proj_SP: Tensor,
    train_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the projections (empty unless `train_experts`) and of the
    weights.
    """
    if _has_kernel(ids_NA, gate_up_E2FD, down_EDF):
        return _backward_compiled(
            grad_ND, x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA, proj_SP, train_experts
        )
    dtype = _compute_dtype(x_ND.dtype)
    num_slots = ids_NA.shape[1]
    x = x_ND.to(dtype)
    grad = grad_ND.to(dtype)
    order_S, segments = _segments(ids_NA, len(down_EDF))
    token_S = order_S // num_slots
    weight_S1 = weights_NA.flatten()[order_S, None].to(dtype)
    grad_x_SD = x.new_empty(len(order_S), x.shape[1])
    grad_weight_S = torch.zeros(len(order_S), dtype=dtype)
    grad_gate_up = torch.zeros_like(gate_up_E2FD) if train_experts else gate_up_E2FD.new_empty(0)
    grad_down = torch.zeros_like(down_EDF) if train_experts else down_EDF.new_empty(0)
    for expert, start, stop in segments:
        tokens = token_S[start:stop]
        weight = weight_S1[start:stop]
        grad_out = grad[tokens]
        grad_hidden = grad_out @ down_EDF[expert].to(dtype)
        hidden, grad_proj = _swiglu_backward(proj_SP[start:stop].to(dtype), grad_hidden, weight)
        grad_weight_S[start:stop] = (hidden * grad_hidden).sum(-1)
        grad_x_SD[start:stop] = grad_proj @ gate_up_E2FD[expert].to(dtype)
        if train_experts:
            grad_down[expert] = grad_out.T @ hidden.mul_(weight)
            grad_gate_up[expert] = grad_proj.T @ x[tokens]
    grad_weights = (
        torch.zeros_like(weights_NA)
        .flatten()
        .index_copy_(0, order_S, grad_weight_S.to(weights_NA.dtype))
    )
    grad_x = _combine(grad_x_SD, order_S, segments, torch.ones_like(weights_NA))
    return grad_x.to(x_ND.dtype), grad_gate_up, grad_down, grad_weights.view_as(weights_NA)


def _backward_compiled(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    ids_NA: Tensor,
    weights_NA: Tensor,
    proj_SP: Tensor,
    train_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from deepseek.kernels.moe import few_tokens_backward, many_tokens

    # With gradients of the weights, the arithmetic dominates, and `many_tokens` uses BLAS for it.
    products = (
        train_experts and len(ids_NA) > 1 and down_EDF.dtype == torch.float32 and openmp.has_sgemm()
    )
    few = _has_few_tokens(ids_NA, len(down_EDF)) and not products
    kernel = few_tokens_backward if few else many_tokens
    grad, x, weights = (t.float().contiguous() for t in (grad_ND, x_ND, weights_NA))
    grad_x, grad_gate_up, grad_down, grad_weights = kernel.backward(
        grad, x, gate_up_E2FD, down_EDF, ids_NA.contiguous(), weights, proj_SP, train_experts
    )
    return grad_x.to(x_ND.dtype), grad_gate_up, grad_down, grad_weights.to(weights_NA.dtype)


def _swiglu_backward(proj: Tensor, grad_hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden values `silu(gate) * up`, and the gradient of the gate and up
    projections.
    """
    gate, up = proj.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    activated = sigmoid * gate
    grad = grad_hidden * weight
    grad_proj = torch.empty_like(proj)
    grad_gate, grad_up = grad_proj.chunk(2, dim=-1)
    torch.mul(grad, activated, out=grad_up)
    # silu'(g) = s + g s (1 - s) = s + silu(g) (1 - s)
    torch.addcmul(sigmoid, activated, 1 - sigmoid, out=grad_gate).mul_(grad).mul_(up)
    return activated * up, grad_proj


@_backward_op.register_fake
def _(
    _grad_ND: Tensor,
    x_ND: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    _ids_NA: Tensor,
    weights_NA: Tensor,
    _proj_SP: Tensor,
    train_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [t.new_empty(t.shape if train_experts else 0) for t in (gate_up_E2FD, down_EDF)]
    return x_ND.new_empty(x_ND.shape), grads[0], grads[1], weights_NA.new_empty(weights_NA.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_ND: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    train_experts = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    grad_x, grad_gate_up, grad_down, grad_weights = _backward_op(
        grad_ND, *ctx.saved_tensors, train_experts
    )
    return (
        grad_x,
        *((grad_gate_up, grad_down) if train_experts else (None, None)),
        None,
        grad_weights,
    )


_mix_op.register_autograd(_backward, setup_context=_setup_context)
