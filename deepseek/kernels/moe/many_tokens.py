"""Mixture of experts for many tokens per expert; forward and backward are one parallel region each.

The slots, sorted by expert, are divided into equal shares, one for each thread, so that the threads
finish together even if the experts' loads are uneven. A thread processes its share in pieces
through gather, product, activation and product, all in its own cache, with single-threaded calls of
torch's BLAS. Torch's operators would start and join all threads for each of these stages. In the
backward pass, a thread processes whole experts, so that each weight gradient has one writer.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from deepseek.kernels.moe.few_tokens import sorted_slots
from deepseek.kernels.moe.few_tokens_backward import untouched_zeros
from deepseek.kernels.numba.launch import compiled, launch, unpack
from deepseek.kernels.numba.matrix_product import product
from deepseek.kernels.numba.primitives import (
    barrier,
    share,
    sigmoid,
    thread_count,
    thread_number,
    widen,
)
from deepseek.kernels.numba.subroutine import subroutine

# Maximum number of rows in a piece; gathered rows and projections then stay in a cache of 1-2 MB.
PIECE = 256


@subroutine
def wide(matrix, buffer):  # type: ignore[no-untyped-def]
    """Convert `matrix` to fp32 in `buffer`; return `buffer`."""
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            buffer[i, j] = widen(matrix[i, j])
    return buffer


@subroutine(fastmath=True)
def _piece(x, gate_up, down, tokens, weights, proj, rows, hidden, out, start, stop):  # type: ignore[no-untyped-def]
    """Compute rows start to stop - 1 of the sorted slots, all of one expert."""
    width = down.shape[1]
    count = stop - start
    for j in range(count):
        rows[j] = x[tokens[start + j]]
    product(rows[:count], False, gate_up, True, proj[:count])
    for j in range(count):
        weight = weights[start + j]
        for f in range(width):
            gate = proj[j, f]
            hidden[j, f] = weight * proj[j, width + f] * gate * sigmoid(gate)
    product(hidden[:count], False, down, True, out[start:stop])


@subroutine
def _share_of_slots(x, gate_up, down, tokens, weights, ends, proj, out):  # type: ignore[no-untyped-def]
    """Compute this thread's share of the slots."""
    first, last = share(ends[len(ends) - 1])
    rows = np.empty((PIECE, x.shape[1]), np.float32)
    hidden = np.empty((PIECE, down.shape[2]), np.float32)
    scratch_proj = np.empty((PIECE, gate_up.shape[1]), np.float32)
    wide_up = np.empty(gate_up.shape[1:], np.float32)
    wide_down = np.empty(down.shape[1:], np.float32)
    start = first
    for e in range(len(ends)):
        stop = min(ends[e], last)
        if stop > start:
            wide_up_proj = wide(gate_up[e], wide_up)
            wide_down_proj = wide(down[e], wide_down)
        while start < stop:
            end = min(start + PIECE, stop)
            target = proj[start:end] if len(proj) else scratch_proj
            _piece(
                x,
                wide_up_proj,
                wide_down_proj,
                tokens,
                weights,
                target,
                rows,
                hidden,
                out,
                start,
                end,
            )
            start = end


@subroutine(fastmath=True)
def combine(out, order, used, y, num_slots):  # type: ignore[no-untyped-def]
    """Sum the rows of `out` that belong to each token, for this thread's tokens."""
    place = np.full(len(order), -1, np.int64)
    for s in range(used):
        place[order[s]] = s
    first, last = share(len(y))
    for n in range(first, last):
        y[n] = 0
        for a in range(num_slots):
            s = place[n * num_slots + a]
            if s >= 0:
                y[n] += out[s]


@subroutine
def _run(x, gate_up, down, ids, slot_weights, y, proj, out):  # type: ignore[no-untyped-def]
    ends = np.empty(len(down), np.int64)
    order, tokens, weights = sorted_slots(ids, slot_weights, ends)
    _share_of_slots(x, gate_up, down, tokens, weights, ends, proj, out)
    barrier()
    combine(out, order, ends[len(ends) - 1], y, ids.shape[1])


@cache
def _kernel(kinds: str) -> int:
    return compiled(lambda data: _run(*unpack(data, kinds)))


def forward(
    x_ND: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    ids_NA: Tensor,
    weights_NA: Tensor,
    proj_SP: Tensor | None,
) -> Tensor:
    """Do what `few_tokens.forward` does; if `proj_SP` is None, the projections are not stored."""
    y_ND = torch.empty_like(x_ND)
    out_SD = x_ND.new_empty(ids_NA.numel(), x_ND.shape[1])
    stored_SP = x_ND.new_empty(0, gate_up_E2FD.shape[1]) if proj_SP is None else proj_SP
    launch(_kernel, x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA, y_ND, stored_SP, out_SD)
    return y_ND


@subroutine(fastmath=True)
def _through_swiglu(weights, proj, hidden, grad_hidden, grad_proj, grad_weights):  # type: ignore[no-untyped-def]
    """Compute the gradients of projections and slot weights from that of the unweighted hidden
    values.

    `hidden` receives the weighted hidden values.
    """
    one = np.float32(1)
    width = hidden.shape[1]
    for j in range(len(hidden)):
        weight = weights[j]
        total = np.float32(0)
        for f in range(width):
            gate = proj[j, f]
            up = proj[j, width + f]
            grad = grad_hidden[j, f]
            sig = sigmoid(gate)
            silu = gate * sig
            total += silu * up * grad
            hidden[j, f] = weight * silu * up
            grad_proj[j, width + f] = grad * weight * silu
            grad_proj[j, f] = grad * weight * up * (sig + silu * (one - sig))
        grad_weights[j] = total


@subroutine
def _experts(  # type: ignore[no-untyped-def]
    grad, x, gate_up, down, tokens, weights, ends, proj, out, grad_gate_up, grad_down, grad_weights
):
    """Compute the gradients of the experts whose middle slot lies in this thread's share of the
    slots.
    """
    used = ends[len(ends) - 1]
    most = ends[0]
    start = 0
    for e in range(1, len(ends)):
        most = max(most, ends[e] - ends[e - 1])
    grads = np.empty((most, x.shape[1]), np.float32)
    rows = np.empty((most, x.shape[1]), np.float32)
    hidden = np.empty((most, down.shape[2]), np.float32)
    grad_hidden = np.empty((most, down.shape[2]), np.float32)
    grad_proj = np.empty((most, gate_up.shape[1]), np.float32)
    wide_up = np.empty(gate_up.shape[1:], np.float32)
    wide_down = np.empty(down.shape[1:], np.float32)
    for e in range(len(ends)):
        stop = ends[e]
        n = stop - start
        if n > 0 and (start + stop) * thread_count() // (2 * used) == thread_number():
            for j in range(n):
                grads[j] = grad[tokens[start + j]]
                rows[j] = x[tokens[start + j]]
            product(grads[:n], False, wide(down[e], wide_down), False, grad_hidden[:n])
            _through_swiglu(
                weights[start:stop],
                proj[start:stop],
                hidden[:n],
                grad_hidden,
                grad_proj,
                grad_weights[start:stop],
            )
            product(grad_proj[:n], False, wide(gate_up[e], wide_up), False, out[start:stop])
            if len(grad_down):
                product(grads[:n], True, hidden[:n], False, grad_down[e])
                product(grad_proj[:n], True, rows[:n], False, grad_gate_up[e])
        start = stop


@subroutine
def _run_backward(  # type: ignore[no-untyped-def]
    grad,
    x,
    gate_up,
    down,
    ids,
    slot_weights,
    proj,
    out,
    grad_x,
    grad_gate_up,
    grad_down,
    grad_weights,
):
    ends = np.empty(len(down), np.int64)
    order, tokens, weights = sorted_slots(ids, slot_weights, ends)
    sorted_grads = np.zeros(ids.size, np.float32)
    _experts(
        grad,
        x,
        gate_up,
        down,
        tokens,
        weights,
        ends,
        proj,
        out,
        grad_gate_up,
        grad_down,
        sorted_grads,
    )
    for s in range(ends[len(ends) - 1]):
        if sorted_grads[s] != 0:
            grad_weights[order[s]] = sorted_grads[s]
    barrier()
    combine(out, order, ends[len(ends) - 1], grad_x, ids.shape[1])


@cache
def _backward_kernel(kinds: str) -> int:
    return compiled(lambda data: _run_backward(*unpack(data, kinds)))


def backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    ids_NA: Tensor,
    weights_NA: Tensor,
    proj_SP: Tensor,
    train_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `few_tokens_backward.backward` does."""
    grad_x = torch.empty_like(x_ND)
    out_SD = x_ND.new_empty(ids_NA.numel(), x_ND.shape[1])
    grad_weights = torch.zeros_like(weights_NA).flatten()
    shapes = [
        t.shape if train_experts else torch.Size([0, *t.shape[1:]])
        for t in (gate_up_E2FD, down_EDF)
    ]
    grads = [untouched_zeros(shape, torch.float32) for shape in shapes]
    inputs = (grad_ND, x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA, proj_SP)
    launch(_backward_kernel, *inputs, out_SD, grad_x, *grads, grad_weights)
    return (
        grad_x,
        grads[0].to(gate_up_E2FD.dtype),
        grads[1].to(down_EDF.dtype),
        grad_weights.view_as(weights_NA),
    )
