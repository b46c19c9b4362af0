"""Attention over intervals on a processor: 16 queries at a time, side by side in the lanes of its vectors.

A unit of work is a stretch of `CHUNK` queries of one key/value head, with all heads that share it. Its intervals are
sorted into their lists; neighbours there look at nearly the same keys. 16 of them form a strip, which walks over those
keys (`strip_forward.py`, `strip_backward.py`). A query belongs to one unit, so results need no locks. Gradients of keys
are gathered from many units: these are dealt out to lanes, each with gradients of its own, to be added up in the end.
"""

from functools import cache
from math import gcd

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from deepseek.kernels import openmp
from deepseek.kernels.few_tokens import pointer, share
from deepseek.kernels.lsh import strip_backward, strip_forward
from deepseek.kernels.lsh.intervals import SPARE, Intervals, Windows
from deepseek.kernels.lsh.product import COLUMNS

CHUNK = 1024
MOST_LANES = 4  # of gradients; each costs as much memory as the keys and values in both orders

_backward, _forward = strip_backward.backward, strip_forward.forward


@njit
def _sorted(lists, start, stop, num_lists):  # type: ignore[no-untyped-def]
    """Return query, start and stop of all intervals that are not empty, sorted by list, and the end of each list."""
    heads, length, count = lists.shape
    rows, starts, stops = (
        np.empty(lists.size, np.int32),
        np.empty(lists.size, np.int32),
        np.empty(lists.size, np.int32),
    )
    ends = np.zeros(num_lists + 1, np.int64)
    for r in range(heads):
        for t in range(length):
            for i in range(count):
                ends[lists[r, t, i] + 1] += stop[r, t, i] > start[r, t, i]
    for c in range(num_lists):
        ends[c + 1] += ends[c]
    for t in range(length):
        for r in range(heads):
            for i in range(count):
                if stop[r, t, i] > start[r, t, i]:
                    place = ends[lists[r, t, i]]
                    rows[place], starts[place], stops[place] = t * heads + r, start[r, t, i], stop[r, t, i]
                    ends[lists[r, t, i]] += 1
    return rows, starts, stops, ends


@njit
def _strips(lists, start, stop, num_lists, most):  # type: ignore[no-untyped-def]
    """Return `_sorted` intervals and the bounds of the strips: up to 16 of one list, over at most `most` keys."""
    rows, starts, stops, ends = _sorted(lists, start, stop, num_lists)
    bounds, count, s = np.zeros(ends[num_lists - 1] + 1, np.int64), 0, 0
    for c in range(num_lists):
        while s < ends[c]:
            first = s
            while s < min(first + COLUMNS, ends[c]) and (s == first or stops[s] - starts[first] <= most):
                s += 1
            count += 1
            bounds[count] = s
    return rows, starts, stops, bounds[: count + 1]


@njit
def _run(arrays, places, grads, num_lists, most, scale, backwards):  # type: ignore[no-untyped-def]
    (q, key, value, out, lse), (lists, start, stop), (grad, grad_q, grad_key, grad_value) = arrays, places, grads
    (batch, length, heads, width), (lanes, _, groups) = q.shape, grad_key.shape[:3]
    own = heads // groups
    buffers = (
        np.zeros((width, COLUMNS), np.float32), np.empty((COLUMNS, width), np.float32),
        np.empty((most + SPARE, COLUMNS), np.float32), np.empty((most + SPARE, COLUMNS), np.float32),
    )  # fmt: skip
    begin, end = share(batch * groups * lanes)
    for unit in range(begin, end):
        b, g, lane = unit // (groups * lanes), unit // lanes % groups, unit % lanes
        h = slice(g * own, (g + 1) * own)
        for t in range(lane * CHUNK, length, lanes * CHUNK):
            u = slice(t, min(t + CHUNK, length))
            strips = _strips(lists[b, h, u], start[b, h, u], stop[b, h, u], num_lists, most)
            views = q[b, u, h], key[b, g], value[b, g], out[b, u, h], lse[b, u, h]
            if backwards:
                targets = grad_q[b, u, h], grad_key[lane, b, g], grad_value[lane, b, g]
                _backward(views, grad[b, u, h], targets, strips, scale, buffers)
            else:
                _forward(views, strips, scale, buffers)


@cache
def _address() -> int:
    @cfunc(types.void(types.CPointer(types.int64)), cache=True)
    def kernel(data):  # type: ignore[no-untyped-def]
        a = carray(data, 24)
        b, t, h, k, g, z, i, lanes = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
        queries, keys, lanes_of_keys, intervals = (b, t, h, k), (b, g, z, k), (lanes, b, g, z, k), (b, h, t, i)
        arrays = (
            carray(pointer(a[11]), queries, np.float32), carray(pointer(a[12]), keys, np.float32),
            carray(pointer(a[13]), keys, np.float32), carray(pointer(a[14]), queries, np.float32),
            carray(pointer(a[15]), (b, t, h), np.float32),
        )  # fmt: skip
        places = (
            carray(pointer(a[16]), intervals, np.int32), carray(pointer(a[17]), intervals, np.int32),
            carray(pointer(a[18]), intervals, np.int32),
        )  # fmt: skip
        grads = (
            carray(pointer(a[19]), queries, np.float32), carray(pointer(a[20]), queries, np.float32),
            carray(pointer(a[21]), lanes_of_keys, np.float32), carray(pointer(a[22]), lanes_of_keys, np.float32),
        )  # fmt: skip
        _run(arrays, places, grads, a[8], a[9], carray(pointer(a[23]), 1, np.float32)[0], a[10] != 0)

    return int(kernel.address)


def _call(
    arrays: list[Tensor], intervals: Intervals, grads: list[Tensor], lanes: int, windows: Windows, scale: float,
    backwards: bool,
) -> None:  # fmt: skip
    places = [part.contiguous() for part in (intervals.list_BHTI, intervals.start_BHTI, intervals.stop_BHTI)]
    dimensions = [*arrays[0].shape, *arrays[1].shape[1:3], places[0].shape[-1], lanes]
    limits = [windows.num_buckets + 2, min(2 * windows.longest(), arrays[1].shape[2]), int(backwards)]
    tensors = (*arrays, *places, *grads, torch.tensor([scale]))
    openmp.parallel(_address(), [*dimensions, *limits, *(tensor.data_ptr() for tensor in tensors)])


def _by_token(x_BHTK: Tensor) -> Tensor:
    return x_BHTK.transpose(1, 2).float().contiguous()


def forward(
    query_BHTK: Tensor, key_BGZK: Tensor, value_BGZK: Tensor, intervals: Intervals, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """See `tiles.forward`; in fp32 throughout."""
    query, key, value = _by_token(query_BHTK), key_BGZK.float(), value_BGZK.float()
    out, lse = torch.zeros_like(query), query.new_empty(query.shape[:3])
    lanes = -(-query.shape[1] // CHUNK)
    unused = [query, query, key, key]  # any address will do for what is not touched
    _call([query, key, value, out, lse], intervals, unused, lanes, windows, scale, backwards=False)
    return out.transpose(1, 2), lse.transpose(1, 2)


def backward(
    grad_BHTK: Tensor, query_BHTK: Tensor, key_BGZK: Tensor, value_BGZK: Tensor, out_BHTK: Tensor, lse_BHT: Tensor,
    intervals: Intervals, windows: Windows, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `tiles.backward`; in fp32 throughout."""
    query, grad, out, lse = (_by_token(part) for part in (query_BHTK, grad_BHTK, out_BHTK, lse_BHT))
    key, value = key_BGZK.float(), value_BGZK.float()
    heads, threads = key.shape[0] * key.shape[1], torch.get_num_threads()
    lanes = min(threads // gcd(threads, heads), MOST_LANES, -(-query.shape[1] // CHUNK))  # threads equally busy
    grads = [grad, torch.zeros_like(query), *(key.new_zeros(lanes, *key.shape) for _ in range(2))]
    _call([query, key, value, out, lse], intervals, grads, lanes, windows, scale, backwards=True)
    return grads[1].transpose(1, 2), grads[2].sum(0), grads[3].sum(0)
