"""`intervals.find_intervals` on a processor: one walk over each head's keys instead of a search for each query."""

from functools import cache

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from deepseek.kernels import openmp
from deepseek.kernels.few_tokens import pointer, share
from deepseek.kernels.lsh.intervals import SPARE, Windows


@njit
def _open_buckets(codes, begin, end, place, opened, filled):  # type: ignore[no-untyped-def]
    """Give every bucket the places that its keys among begin to end - 1 need, from `place` on."""
    opened[:] = 0
    for j in range(begin, end):
        opened[codes[j]] += 1
    for c in range(len(opened) - 1):
        opened[c], place = place, place + opened[c]
        filled[c] = opened[c]


@njit
def _put(j, code, order, filled, padding):  # type: ignore[no-untyped-def]
    """Lay key j at the next place of its bucket."""
    if code != padding:
        order[filled[code]] = j
        filled[code] += 1


@njit
def _look(lists, opened, filled, near, start, stop, sinks, window):  # type: ignore[no-untyped-def]
    """Note the intervals of one query's heads; `near` is the local one."""
    for r in range(lists.shape[0]):
        start[r, 0], stop[r, 0] = near
        for q in range(1, lists.shape[1]):
            bucket = lists[r, q] - 1
            stop[r, q] = filled[bucket]
            start[r, q] = max(opened[bucket], filled[bucket] - (sinks if q == 1 else window))


@njit
def _sweep(codes, first, lists, order, start, stop, local, sinks, window, padding):  # type: ignore[no-untyped-def]
    """One key/value head: document by document, key by key."""
    total = len(codes)
    opened, filled = np.empty(padding + 1, np.int64), np.empty(padding + 1, np.int64)
    seen, left, idle, begin = 0, 0, 0, 0  # keys seen, keys that have left the window, padding, start of the document
    for i in range(total):
        if first[i] == i:
            for j in range(max(begin, i - local), i):
                _put(j, codes[j], order, filled, padding)
            begin, left, end = i, seen, i + 1
            while end < total and first[end] == i:
                end += 1
            _open_buckets(codes, begin, end, total + seen, opened, filled)
        if i - local >= begin:
            _put(i - local, codes[i - local], order, filled, padding)
            left += codes[i - local] != padding
        if codes[i] == padding:
            idle += 1
            order[total - idle], order[2 * total - idle] = i, i
        else:
            order[seen] = i
            seen += 1
        t = i - (total - len(lists))
        if t >= 0 and codes[i] != padding:
            _look(lists[t], opened, filled, (left, seen), start[t], stop[t], sinks, window)
    for j in range(max(begin, total - local), total):
        _put(j, codes[j], order, filled, padding)


@cache
def _address() -> int:
    @cfunc(types.void(types.CPointer(types.int64)), cache=True)
    def kernel(data):  # type: ignore[no-untyped-def]
        a = carray(data, 17)
        b, g, s, t, h, q, z = a[6], a[7], a[8], a[9], a[10], a[11], a[16]
        codes, first = carray(pointer(a[0]), (b, g, s), np.int32), carray(pointer(a[1]), (b, s), np.int32)
        lists, order = carray(pointer(a[2]), (b, t, h, q), np.int32), carray(pointer(a[3]), (b, g, z), np.int64)
        start = carray(pointer(a[4]), (b, t, h, q), np.int32)
        stop = carray(pointer(a[5]), (b, t, h, q), np.int32)
        begin, end = share(b * g)
        for head in range(begin, end):
            i, j = head // g, head % g
            heads = slice(j * (h // g), (j + 1) * (h // g))
            _sweep(
                codes[i, j], first[i], lists[i, :, heads], order[i, j], start[i, :, heads], stop[i, :, heads],
                a[12], a[13], a[14], a[15],
            )  # fmt: skip

    return int(kernel.address)


def find_intervals(
    list_BTHI: Tensor, marked_BGS: Tensor, first_BS: Tensor, windows: Windows
) -> tuple[Tensor, Tensor, Tensor]:
    """Return order, start and stop of `Intervals`."""
    (batch, groups, total), lists = marked_BGS.shape, list_BTHI.contiguous()
    order = torch.zeros(batch, groups, 2 * total + SPARE, dtype=torch.long)
    start, stop = torch.zeros_like(lists), torch.zeros_like(lists)
    codes, first = marked_BGS.int().contiguous(), first_BS.int().contiguous()
    tensors = (codes, first, lists, order, start, stop)
    sizes = [batch, groups, total, *lists.shape[1:]]
    limits = [windows.local, windows.sinks, windows.bucket, windows.num_buckets + 1, order.shape[-1]]
    openmp.parallel(_address(), [t.data_ptr() for t in tensors] + sizes + limits)
    return order, start, stop
