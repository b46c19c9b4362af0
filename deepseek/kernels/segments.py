"""The experts of a mixture on a processor: slots sorted by expert, one matrix product per expert and projection.

No tensor of size `[N * A, D]` is ever made: an expert's rows are gathered, multiplied and added to the result while
they are in the cache. Where bf16 products are emulated, an expert's weights are widened to fp32 just before use.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from deepseek.kernels import openmp
from deepseek.kernels.cpu import fast_dtype

# Up to this many slots per expert, on average, reading the weights takes longer than the arithmetic on them.
FEW = 8
# Pools below this number of parameters are not worth the seconds that compiling a kernel takes the first time.
SMALL = 1 << 18


def mix_experts(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
    """See `grouped_mm.mix_experts`."""
    tensors = (x_ND, gate_up_E2FD, down_EDF, weights_NA)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        y_ND, _ = _mix_op(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA)
        return y_ND
    return _forward(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA, None)


def is_slow(gate_up_E2FD: Tensor, ids_NA: Tensor) -> bool:
    """Whether grouped products train these experts faster: where bf16 products are native, widening weights is not."""
    native = gate_up_E2FD.dtype == torch.bfloat16 == _compute_dtype(torch.bfloat16)
    trained = torch.is_grad_enabled() and gate_up_E2FD.requires_grad
    return native and trained and ids_NA.shape[0] > 1 and _has_few_tokens(ids_NA, len(gate_up_E2FD))


def _has_few_tokens(ids_NA: Tensor, num_experts: int) -> bool:
    return ids_NA.numel() <= FEW * num_experts


def _has_kernel(ids_NA: Tensor, *weights: Tensor) -> bool:
    """Whether a compiled kernel can take these weights and be faster than torch's own operators."""
    dtypes = (torch.float32, torch.bfloat16)
    if ids_NA.numel() == 0 or sum(t.numel() for t in weights) < SMALL:
        return False
    if not all(t.dtype == weights[0].dtype in dtypes and t.is_contiguous() for t in weights):
        return False
    if _has_few_tokens(ids_NA, len(weights[0])):
        return openmp.runtime() is not None
    return _compute_dtype(weights[0].dtype) == torch.float32 and openmp.has_sgemm()


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else fast_dtype("cpu")


def _saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the projections kept for the backward pass: at least fp32, whichever way computed them."""
    return torch.promote_types(dtype, torch.float32)


def _segments(ids_NA: Tensor, num_experts: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Return the slots sorted by expert `[N * A]`, and (expert, start, stop) of every expert that has any."""
    ids_S = ids_NA.flatten()
    counts = torch.bincount(ids_S, minlength=num_experts)[:num_experts]
    spans = zip(counts.tolist(), counts.cumsum(0).tolist(), strict=True)
    bounds = [(expert, stop - count, stop) for expert, (count, stop) in enumerate(spans) if count]
    return ids_S.argsort(stable=True), bounds


def _forward(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor, proj_SP: Tensor | None
) -> Tensor:
    """Return y `[N, D]`; where `proj_SP` is given, fill it with the gate and up projections of the sorted slots."""
    if _has_kernel(ids_NA, gate_up_E2FD, down_EDF):
        return _forward_compiled(x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA, proj_SP)
    dtype = _compute_dtype(x_ND.dtype)
    x, num_experts, num_slots = x_ND.to(dtype), len(down_EDF), ids_NA.shape[1]
    y_ND = torch.zeros(x.shape, dtype=torch.promote_types(dtype, torch.float32))
    order_S, segments = _segments(ids_NA, num_experts)
    token_S, weight_S1 = order_S // num_slots, weights_NA.flatten()[order_S, None].to(dtype)
    for expert, start, stop in segments:
        tokens = token_S[start:stop]
        proj = x[tokens] @ gate_up_E2FD[expert].to(dtype).T
        if proj_SP is not None:
            proj_SP[start:stop] = proj
        gate, up = proj.chunk(2, dim=-1)
        hidden = silu(gate).mul_(up).mul_(weight_S1[start:stop])
        y_ND.index_add_(0, tokens, (hidden @ down_EDF[expert].to(dtype).T).to(y_ND.dtype))
    return y_ND.to(x_ND.dtype)


def _forward_compiled(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor, proj_SP: Tensor | None
) -> Tensor:
    from deepseek.kernels import few_tokens, many_tokens  # they import numba, which nothing else needs

    kernel = few_tokens if _has_few_tokens(ids_NA, len(down_EDF)) else many_tokens
    x, ids, weights = x_ND.float().contiguous(), ids_NA.contiguous(), weights_NA.float().contiguous()
    return kernel.forward(x, gate_up_E2FD, down_EDF, ids, weights, proj_SP).to(x_ND.dtype)


@torch.library.custom_op("deepseek::mix_experts", mutates_args=())
def _mix_op(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y and the gate and up projections `[N * A, 2F]` that the backward pass needs."""
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
    """Return the gradients of x, the projections (empty unless `train_experts`) and the weights."""
    if _has_kernel(ids_NA, gate_up_E2FD, down_EDF):
        return _backward_compiled(grad_ND, x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA, proj_SP, train_experts)
    dtype, num_slots = _compute_dtype(x_ND.dtype), ids_NA.shape[1]
    x, grad = x_ND.to(dtype), grad_ND.to(dtype)
    order_S, segments = _segments(ids_NA, len(down_EDF))
    token_S, weight_S1 = order_S // num_slots, weights_NA.flatten()[order_S, None].to(dtype)
    grad_x = torch.zeros(x.shape, dtype=torch.promote_types(dtype, torch.float32))
    grad_weight_S = torch.zeros(len(order_S), dtype=dtype)
    grad_gate_up = torch.zeros_like(gate_up_E2FD) if train_experts else gate_up_E2FD.new_empty(0)
    grad_down = torch.zeros_like(down_EDF) if train_experts else down_EDF.new_empty(0)
    for expert, start, stop in segments:
        tokens, weight = token_S[start:stop], weight_S1[start:stop]
        grad_out = grad[tokens]
        grad_hidden = grad_out @ down_EDF[expert].to(dtype)
        hidden, grad_proj = _swiglu_backward(proj_SP[start:stop].to(dtype), grad_hidden, weight)
        grad_weight_S[start:stop] = (hidden * grad_hidden).sum(-1)
        grad_x.index_add_(0, tokens, (grad_proj @ gate_up_E2FD[expert].to(dtype)).to(grad_x.dtype))
        if train_experts:
            grad_down[expert] = grad_out.T @ hidden.mul_(weight)
            grad_gate_up[expert] = grad_proj.T @ x[tokens]
    grad_weights = torch.zeros_like(weights_NA).flatten().index_copy_(0, order_S, grad_weight_S.to(weights_NA.dtype))
    return grad_x.to(x_ND.dtype), grad_gate_up, grad_down, grad_weights.view_as(weights_NA)


def _backward_compiled(
    grad_ND: Tensor, x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor,
    proj_SP: Tensor, train_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from deepseek.kernels import few_tokens_backward, many_tokens

    kernel = few_tokens_backward if _has_few_tokens(ids_NA, len(down_EDF)) else many_tokens
    grad, x, weights = (t.float().contiguous() for t in (grad_ND, x_ND, weights_NA))
    grad_x, grad_gate_up, grad_down, grad_weights = kernel.backward(
        grad, x, gate_up_E2FD, down_EDF, ids_NA.contiguous(), weights, proj_SP, train_experts
    )
    return grad_x.to(x_ND.dtype), grad_gate_up, grad_down, grad_weights.to(weights_NA.dtype)


def _swiglu_backward(proj: Tensor, grad_hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden values `silu(gate) * up` and the gradient of the gate and up projections."""
    gate, up = proj.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    activated, grad = sigmoid * gate, grad_hidden * weight
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
    grad_x, grad_gate_up, grad_down, grad_weights = _backward_op(grad_ND, *ctx.saved_tensors, train_experts)
    return grad_x, *((grad_gate_up, grad_down) if train_experts else (None, None)), None, grad_weights


_mix_op.register_autograd(_backward, setup_context=_setup_context)
