"""The backward pass of `strips`: strips compute their weights again from the denominators.

Gradients of keys are gathered from many units. So that threads need not wait for each other, units are dealt out to
lanes, each of which has its own gradients of keys and values; they are added up in the end.
"""

from functools import cache
from math import gcd

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from deepseek.kernels import openmp
from deepseek.kernels.few_tokens import exp, pointer, share
from deepseek.kernels.lsh.intervals import SPARE, Intervals, Windows
from deepseek.kernels.lsh.product import COLUMNS, multiply, multiply_add
from deepseek.kernels.lsh.strips import CHUNK, EXACT, gather, hide, sizes, sorted_pairs, strip_end

MOST_LANES = 4  # each costs as much memory as two copies of the gradients of keys and values


@njit(fastmath=EXACT)
def _dots(grad, out, dots):  # type: ignore[no-untyped-def]
    """Set `dots` to the product of each query's output with its gradient."""
    for r in range(len(dots)):
        t, h = r // out.shape[1], r % out.shape[1]
        total = np.float32(0)
        for k in range(out.shape[2]):
            total += grad[t, h, k] * out[t, h, k]
        dots[r] = total


@njit
def _stack(x, rows, scale, heads, stacked):  # type: ignore[no-untyped-def]
    """Set the first rows of `stacked` to the rows of x, scaled; the others to zero."""
    stacked[len(rows) :] = 0
    for m in range(len(rows)):
        row = x[rows[m] // heads, rows[m] % heads]
        for k in range(len(row)):
            stacked[m, k] = scale * row[k]


@njit(fastmath=EXACT)
def _through_softmax(weights, grads, count, lse, dots):  # type: ignore[no-untyped-def]
    """From scores to weights, and from the gradient of weights to that of scores; zero past the last key."""
    for j in range(count):
        for m in range(COLUMNS):
            below = weights[j, m] - lse[m]
            weight = exp(below) if below > np.float32(-87) else np.float32(0)
            weights[j, m] = weight
            grads[j, m] = weight * (grads[j, m] - dots[m])
    weights[count : count + SPARE] = 0
    grads[count : count + SPARE] = 0


@njit
def _strip(  # type: ignore[no-untyped-def]
    q, key, value, grad, lse, dots, rows, starts, stops, scale, grad_q, grad_key, grad_value, buffers
):
    side, stacked, weights, grads, part = buffers
    (_, heads, width), one = q.shape, np.float32(1)
    base = starts[0]
    count = stops[-1] - base
    lse_m, dots_m = np.zeros(COLUMNS, np.float32), np.zeros(COLUMNS, np.float32)
    for m in range(len(rows)):
        lse_m[m], dots_m[m] = lse[rows[m] // heads, rows[m] % heads], dots[rows[m]]
    k, v = key[base:].ctypes.data, value[base:].ctypes.data
    gather(grad, rows, one, heads, side)
    multiply(v, width, 1, side.ctypes.data, COLUMNS, grads.ctypes.data, COLUMNS, count, COLUMNS, width)
    gather(q, rows, scale, heads, side)
    multiply(k, width, 1, side.ctypes.data, COLUMNS, weights.ctypes.data, COLUMNS, count, COLUMNS, width)
    hide(weights, count, base, starts, stops)
    _through_softmax(weights, grads, count, lse_m, dots_m)
    multiply(grads.ctypes.data, 1, COLUMNS, k, width, part.ctypes.data, width, COLUMNS, width, count)
    for m in range(len(rows)):
        target = grad_q[rows[m] // heads, rows[m] % heads]
        for i in range(width):
            target[i] += scale * part[m, i]
    _stack(q, rows, scale, heads, stacked)
    into = grad_key[base:].ctypes.data
    multiply_add(grads.ctypes.data, COLUMNS, 1, stacked.ctypes.data, width, into, width, count, width, COLUMNS)
    _stack(grad, rows, one, heads, stacked)
    into = grad_value[base:].ctypes.data
    multiply_add(weights.ctypes.data, COLUMNS, 1, stacked.ctypes.data, width, into, width, count, width, COLUMNS)


@njit
def _unit(  # type: ignore[no-untyped-def]
    q, key, value, grad, out, lse, lists, start, stop, num_lists, most, scale, grad_q, grad_key, grad_value, buffers
):
    count = lists.size
    rows, starts, stops = np.empty(count, np.int32), np.empty(count, np.int32), np.empty(count, np.int32)
    dots, ends = np.empty(q.shape[0] * q.shape[1], np.float32), np.empty(num_lists + 1, np.int64)
    _dots(grad, out, dots)
    sorted_pairs(lists, start, stop, num_lists, rows, starts, stops, ends)
    first = 0
    for c in range(num_lists):
        while first < ends[c]:
            last = strip_end(first, ends[c], starts, stops, most)
            pairs = slice(first, last)
            _strip(
                q, key, value, grad, lse, dots, rows[pairs], starts[pairs], stops[pairs], scale, grad_q, grad_key,
                grad_value, buffers,
            )  # fmt: skip
            first = last


@njit
def _run(  # type: ignore[no-untyped-def]
    q, key, value, grad, out, lse, lists, start, stop, num_lists, most, scale, grad_q, grad_key, grad_value
):
    (batch, length, heads, width), (lanes, _, groups) = q.shape, grad_key.shape[:3]
    share_of_heads = heads // groups
    buffers = (
        np.zeros((width, COLUMNS), np.float32), np.empty((COLUMNS, width), np.float32),
        np.empty((most + SPARE, COLUMNS), np.float32), np.empty((most + SPARE, COLUMNS), np.float32),
        np.empty((COLUMNS, width), np.float32),
    )  # fmt: skip
    begin, end = share(batch * groups * lanes)
    for unit in range(begin, end):
        b, g, lane = unit // (groups * lanes), unit // lanes % groups, unit % lanes
        h = slice(g * share_of_heads, (g + 1) * share_of_heads)
        for t in range(lane * CHUNK, length, lanes * CHUNK):
            u = slice(t, min(t + CHUNK, length))
            _unit(
                q[b, u, h], key[b, g], value[b, g], grad[b, u, h], out[b, u, h], lse[b, u, h], lists[b, u, h],
                start[b, u, h], stop[b, u, h], num_lists, most, scale, grad_q[b, u, h], grad_key[lane, b, g],
                grad_value[lane, b, g], buffers,
            )  # fmt: skip


@cache
def _address() -> int:
    @cfunc(types.void(types.CPointer(types.int64)), cache=True)
    def kernel(data):  # type: ignore[no-untyped-def]
        a = carray(data, 23)
        b, t, h, k, g, z, i, lanes = a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[22]
        _run(
            carray(pointer(a[0]), (b, t, h, k), np.float32), carray(pointer(a[1]), (b, g, z, k), np.float32),
            carray(pointer(a[2]), (b, g, z, k), np.float32), carray(pointer(a[3]), (b, t, h, k), np.float32),
            carray(pointer(a[4]), (b, t, h, k), np.float32), carray(pointer(a[5]), (b, t, h), np.float32),
            carray(pointer(a[6]), (b, t, h, i), np.int32), carray(pointer(a[7]), (b, t, h, i), np.int32),
            carray(pointer(a[8]), (b, t, h, i), np.int32), a[20], a[21], carray(pointer(a[9]), 1, np.float32)[0],
            carray(pointer(a[10]), (b, t, h, k), np.float32), carray(pointer(a[11]), (lanes, b, g, z, k), np.float32),
            carray(pointer(a[12]), (lanes, b, g, z, k), np.float32),
        )  # fmt: skip

    return int(kernel.address)


def _lanes(heads: int, length: int) -> int:
    """Return how many lanes keep all threads equally busy, within the memory that they may cost."""
    threads = torch.get_num_threads()
    return min(threads // gcd(threads, heads), MOST_LANES, -(-length // CHUNK))


def backward(
    grad_BTHK: Tensor, query_BTHK: Tensor, key_BGZK: Tensor, value_BGZK: Tensor, out_BTHK: Tensor, lse_BTH: Tensor,
    intervals: Intervals, windows: Windows, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `tiles.backward`; in fp32 throughout."""
    inputs = [part.float().contiguous() for part in (query_BTHK, key_BGZK, value_BGZK, grad_BTHK)]
    places = [part.contiguous() for part in (intervals.list_BTHI, intervals.start_BTHI, intervals.stop_BTHI)]
    lanes = _lanes(key_BGZK.shape[0] * key_BGZK.shape[1], query_BTHK.shape[1])
    grad_query = torch.zeros_like(inputs[0])
    grad_key, grad_value = (inputs[1].new_zeros(lanes, *key_BGZK.shape) for _ in range(2))
    tensors = (*inputs, out_BTHK, lse_BTH, *places, torch.tensor([scale]), grad_query, grad_key, grad_value)
    numbers = [*sizes(query_BTHK, key_BGZK, intervals, windows), lanes]
    openmp.parallel(_address(), [t.data_ptr() for t in tensors] + numbers)
    return grad_query, grad_key.sum(0), grad_value.sum(0)
