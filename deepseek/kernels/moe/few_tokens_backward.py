"""Backward pass of `few_tokens`: reads each weight row once and writes its gradient at the same
time.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from deepseek.kernels.moe.few_tokens import sorted_slots
from deepseek.kernels.numba.launch import compiled, launch, unpack
from deepseek.kernels.numba.primitives import barrier, narrow, share, sigmoid, thread_number, widen
from deepseek.kernels.numba.subroutine import subroutine


@subroutine(fastmath=True)
def _add4(a, b, c, d, p, q, r, s, out):  # type: ignore[no-untyped-def]
    """Add four weighted rows to `out`."""
    for i in range(len(out)):
        out[i] += a * widen(p[i]) + b * widen(q[i]) + c * widen(r[i]) + d * widen(s[i])


@subroutine(fastmath=True)
def _rows_back(scales, s, k, rows, first, last, out):  # type: ignore[no-untyped-def]
    """Add four weight rows from k on, columns first to last - 1, to `out`, each times its scale for
    slot s.
    """
    _add4(
        scales[s, 0],
        scales[s, 1],
        scales[s, 2],
        scales[s, 3],
        rows[k, first:last],
        rows[k + 1, first:last],
        rows[k + 2, first:last],
        rows[k + 3, first:last],
        out,
    )


@subroutine(fastmath=True)
def _outer(scales, j, vectors, rows, span, columns, row, out):  # type: ignore[no-untyped-def]
    """Set the gradient `out` of a weight row to the sum over slots s in `span` of `scales[s, j] *
    vectors[rows[s]]`.

    Columns are sliced row by row, because numba treats a row of a sliced matrix as strided and does
    not vectorise loops over it.
    """
    (start, stop), (c, d), zero = span, columns, np.float32(0)
    row[:] = 0
    # The last iteration has one to four slots; those that are missing get a scale of zero.
    for s in range(start, stop, 4):
        t = min(s + 1, stop - 1)
        u = min(s + 2, stop - 1)
        v = min(s + 3, stop - 1)
        _add4(
            scales[s, j],
            scales[t, j] if t > s else zero,
            scales[u, j] if u > t else zero,
            scales[v, j] if v > u else zero,
            vectors[rows[s], c:d],
            vectors[rows[t], c:d],
            vectors[rows[u], c:d],
            vectors[rows[v], c:d],
            row,
        )
    for i in range(len(out)):
        out[i] = narrow(row[i], out[i])


@subroutine(fastmath=True)
def _activate(weights, proj, hidden, grad_hidden, start, stop, first):  # type: ignore[no-untyped-def]
    """Recompute the weighted hidden values of an expert's slots, and set their gradient to zero."""
    width = proj.shape[1] // 2
    for s in range(start, stop):
        for f in range(hidden.shape[1]):
            gate = proj[s, first + f]
            hidden[s, f] = weights[s] * proj[s, width + first + f] * gate * sigmoid(gate)
            grad_hidden[s, f] = 0


@subroutine(fastmath=True)
def _through_swiglu(weights, proj, grad_hidden, grad_proj, start, stop, first, grad_weights):  # type: ignore[no-untyped-def]
    """Compute the gradients of the gate and up projections, and add to those of the slots'
    weights.
    """
    one = np.float32(1)
    width = proj.shape[1] // 2
    for s in range(start, stop):
        total = np.float32(0)
        for f in range(grad_hidden.shape[1]):
            gate = proj[s, first + f]
            up = proj[s, width + first + f]
            grad = grad_hidden[s, f]
            sig = sigmoid(gate)
            silu = gate * sig
            total += silu * up * grad
            grad_proj[s, width + first + f] = grad * weights[s] * silu
            grad_proj[s, first + f] = grad * weights[s] * up * (sig + silu * (one - sig))
        grad_weights[s] += total


@subroutine(fastmath=True)
def _down(grad, down, tokens, weights, ends, proj, grad_proj, grad_down, grad_weights, first, last):  # type: ignore[no-untyped-def]
    """Compute the gradients of hidden columns first to last - 1, and those columns of the down
    projection's gradient.
    """
    slots = len(tokens)
    width = last - first
    start = 0
    hidden = np.empty((slots, width), np.float32)
    grad_hidden = np.empty((slots, width), np.float32)
    row = np.empty(width, np.float32)
    scales = np.empty((slots, 4), np.float32)
    identity = np.arange(slots)
    for e in range(len(ends)):
        stop = ends[e]
        if stop > start:
            _activate(weights, proj, hidden, grad_hidden, start, stop, first)
            for d in range(0, down.shape[1], 4):
                for s in range(start, stop):
                    scales[s] = grad[tokens[s], d : d + 4]
                    _rows_back(scales, s, d, down[e], first, last, grad_hidden[s])
                if len(grad_down):
                    expert_grad = grad_down[e]
                    for j in range(4):
                        _outer(
                            scales,
                            j,
                            hidden,
                            identity,
                            (start, stop),
                            (0, width),
                            row,
                            expert_grad[d + j, first:last],
                        )
            _through_swiglu(weights, proj, grad_hidden, grad_proj, start, stop, first, grad_weights)
        start = stop


@subroutine(fastmath=True)
def _gate_up(x, gate_up, tokens, ends, grad_proj, grad_x, grad_gate_up, first, last):  # type: ignore[no-untyped-def]
    """Compute the gradients of columns first to last - 1 of x, and those columns of the gate and up
    projections' gradient.
    """
    row = np.empty(last - first, np.float32)
    scales = np.empty((len(tokens), 4), np.float32)
    start = 0
    grad_x[:, first:last] = 0
    for e in range(len(ends)):
        stop = ends[e]
        if stop > start:
            for p in range(0, gate_up.shape[1], 4):
                for s in range(start, stop):
                    scales[s] = grad_proj[s, p : p + 4]
                    _rows_back(scales, s, p, gate_up[e], first, last, grad_x[tokens[s], first:last])
                if len(grad_gate_up):
                    expert_grad = grad_gate_up[e]
                    for j in range(4):
                        _outer(
                            scales,
                            j,
                            x,
                            tokens,
                            (start, stop),
                            (first, last),
                            row,
                            expert_grad[p + j, first:last],
                        )
        start = stop


@subroutine
def _run(  # type: ignore[no-untyped-def]
    grad,
    x,
    gate_up,
    down,
    ids,
    slot_weights,
    proj,
    grad_proj,
    grad_x,
    grad_gate_up,
    grad_down,
    grad_weights,
):
    ends = np.empty(len(down), np.int64)
    order, tokens, weights = sorted_slots(ids, slot_weights, ends)
    partial_grads = np.zeros(ids.size, np.float32)
    first, last = share(down.shape[2])
    _down(grad, down, tokens, weights, ends, proj, grad_proj, grad_down, partial_grads, first, last)
    for s in range(ends[len(ends) - 1]):
        grad_weights[thread_number(), order[s]] = partial_grads[s]
    barrier()
    first, last = share(x.shape[1])
    _gate_up(x, gate_up, tokens, ends, grad_proj, grad_x, grad_gate_up, first, last)


@cache
def _kernel(kinds: str) -> int:
    return compiled(lambda data: _run(*unpack(data, kinds)))


def untouched_zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return zeros whose memory the system allocates page by page at the first write.

    The gradients of experts without tokens then cost nothing; `torch.zeros` would write them all.

    Args:
        shape: shape of the tensor.
        dtype: fp32 or bf16.
    """
    return torch.from_numpy(
        np.zeros(shape, np.float32 if dtype == torch.float32 else np.uint16)
    ).view(dtype)


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
    """Return the gradients of x, gate_up and down (both empty unless `train_experts`) and the
    slots' weights.

    Args:
        grad_ND: gradient of y.
        x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA: inputs of `few_tokens.forward`.
        proj_SP: the projections that it computed.
        train_experts: whether to compute the gradients of the experts' weights.
    """
    grad_x = torch.empty_like(x_ND)
    grad_proj = torch.empty_like(proj_SP)
    grad_weights = x_ND.new_zeros(torch.get_num_threads(), ids_NA.numel())
    experts = (gate_up_E2FD, down_EDF)
    grads = [
        untouched_zeros(t.shape, t.dtype) if train_experts else t.new_empty(0, *t.shape[1:])
        for t in experts
    ]
    launch(
        _kernel,
        grad_ND,
        x_ND,
        *experts,
        ids_NA,
        weights_NA,
        proj_SP,
        grad_proj,
        grad_x,
        *grads,
        grad_weights,
    )
    grad_gate_up, grad_down = grads if train_experts else (grad.flatten() for grad in grads)
    return grad_x, grad_gate_up, grad_down, grad_weights.sum(0).view_as(weights_NA)
