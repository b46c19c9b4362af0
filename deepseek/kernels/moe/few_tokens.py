"""Mixture of experts for few tokens per expert: bound by reading the weights, so they are read
once.

The kernel iterates over the weight rows of every expert with tokens and multiplies each row by all
of them. bf16 rows are converted in registers. The threads split the rows, not the tokens, so no two
of them write to the same place.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from deepseek.kernels.numba.launch import compiled, launch, unpack
from deepseek.kernels.numba.primitives import barrier, share, sigmoid, widen
from deepseek.kernels.numba.subroutine import subroutine


@subroutine(fastmath=True)
def _sort(ids_S, order_S, ends_E):  # type: ignore[no-untyped-def]
    """Sort the slots by expert (counting sort); `ends_E` receives the end of each expert's
    slots.
    """
    ends_E[:] = 0
    num_experts = len(ends_E)
    for s in range(len(ids_S)):
        if ids_S[s] < num_experts:
            ends_E[ids_S[s]] += 1
    total = 0
    for e in range(num_experts):
        total += ends_E[e]
        ends_E[e] = total
    for s in range(len(ids_S) - 1, -1, -1):
        if ids_S[s] < num_experts:
            ends_E[ids_S[s]] -= 1
            order_S[ends_E[ids_S[s]]] = s
    for e in range(num_experts - 1):
        ends_E[e] = ends_E[e + 1]
    ends_E[num_experts - 1] = total


@subroutine(fastmath=True)
def _dot1(row, a):  # type: ignore[no-untyped-def]
    """Return the dot product of a weight row and a vector."""
    s = np.float32(0)
    for i in range(len(row)):
        s += widen(row[i]) * a[i]
    return s


@subroutine(fastmath=True)
def _dot4(row, a, b, c, d):  # type: ignore[no-untyped-def]
    """Return the dot products of a weight row and four vectors."""
    s = np.float32(0)
    t = np.float32(0)
    u = np.float32(0)
    v = np.float32(0)
    for i in range(len(row)):
        w = widen(row[i])
        s += w * a[i]
        t += w * b[i]
        u += w * c[i]
        v += w * d[i]
    return s, t, u, v


@subroutine(fastmath=True)
def _rows(row, x, tokens, start, stop, out):  # type: ignore[no-untyped-def]
    """Set `out[j]` to the dot product of `row` and token `tokens[start + j]` of x."""
    s = start
    while s + 4 <= stop:
        j = s - start
        out[j], out[j + 1], out[j + 2], out[j + 3] = _dot4(
            row, x[tokens[s]], x[tokens[s + 1]], x[tokens[s + 2]], x[tokens[s + 3]]
        )
        s += 4
    while s < stop:
        out[s - start] = _dot1(row, x[tokens[s]])
        s += 1


@subroutine(fastmath=True)
def _project(x, gate_up, tokens, weights, ends, proj, hidden, first, last, gate, up):  # type: ignore[no-untyped-def]
    """Compute columns first to last - 1 of the gate and up projections and of the weighted hidden
    values.
    """
    width = gate_up.shape[1] // 2
    start = 0
    for e in range(len(ends)):
        stop = ends[e]
        if stop > start:
            for f in range(first, last):
                _rows(gate_up[e, f], x, tokens, start, stop, gate)
                _rows(gate_up[e, width + f], x, tokens, start, stop, up)
                for s in range(start, stop):
                    g = gate[s - start]
                    u = up[s - start]
                    proj[s, f] = g
                    proj[s, width + f] = u
                    hidden[s, f] = weights[s] * u * g * sigmoid(g)
        start = stop


@subroutine(fastmath=True)
def _combine(hidden, down, slots, tokens, ends, y, first, last, out):  # type: ignore[no-untyped-def]
    """Compute columns first to last - 1 of y."""
    y[:, first:last] = 0
    start = 0
    for e in range(len(ends)):
        stop = ends[e]
        if stop > start:
            for d in range(first, last):
                _rows(down[e, d], hidden, slots, start, stop, out)
                for s in range(start, stop):
                    y[tokens[s], d] += out[s - start]
        start = stop


@subroutine(fastmath=True)
def sorted_slots(ids, slot_weights, ends):  # type: ignore[no-untyped-def]
    """Return slot number, token and weight of the slots in use, sorted by expert; `ends` receives
    each expert's end.
    """
    slots = ids.size
    num_slots = ids.shape[1]
    order = np.empty(slots, np.int64)
    tokens = np.empty(slots, np.int64)
    weights = np.empty(slots, np.float32)
    _sort(ids.reshape(slots), order, ends)
    for s in range(ends[len(ends) - 1]):
        tokens[s] = order[s] // num_slots
        weights[s] = slot_weights[tokens[s], order[s] % num_slots]
    return order, tokens, weights


@subroutine
def _run(x, gate_up, down, ids, slot_weights, y, proj, hidden):  # type: ignore[no-untyped-def]
    ends = np.empty(len(down), np.int64)
    _, tokens, weights = sorted_slots(ids, slot_weights, ends)
    out = np.empty(ids.size, np.float32)
    more = np.empty(ids.size, np.float32)
    first, last = share(down.shape[2])
    _project(x, gate_up, tokens, weights, ends, proj, hidden, first, last, out, more)
    barrier()
    first, last = share(y.shape[1])
    _combine(hidden, down, np.arange(ids.size), tokens, ends, y, first, last, out)


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
    """Return y `[N, D]` in fp32.

    All tensors are contiguous. x, the weights of the slots and `proj_SP` are fp32; the experts'
    weights are fp32 or bf16.

    Args:
        x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA: see `grouped_mm.mix_experts`.
        proj_SP: receives the gate and up projections of the slots sorted by expert; None discards
            them.
    """
    proj_SP = x_ND.new_empty(ids_NA.numel(), gate_up_E2FD.shape[1]) if proj_SP is None else proj_SP
    y_ND = torch.empty_like(x_ND)
    hidden_SF = x_ND.new_empty(ids_NA.numel(), down_EDF.shape[2])
    launch(_kernel, x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA, y_ND, proj_SP, hidden_SF)
    return y_ND
