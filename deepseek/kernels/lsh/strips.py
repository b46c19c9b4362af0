"""Attention over intervals on a processor: 16 queries at a time, side by side in the lanes of its vectors.

A unit of work is a stretch of `CHUNK` queries of one key/value head, with all its heads, so that no two threads write
to the same place. Its intervals are sorted into their lists; neighbours there look at nearly the same keys. 16 of them
form a strip, which walks over those keys: scores, running maximum and sum, weighted values. See `sweep.py` for threads.
"""

from functools import cache

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from deepseek.kernels import openmp
from deepseek.kernels.few_tokens import exp, pointer, share
from deepseek.kernels.lsh.intervals import SPARE, Intervals, Windows
from deepseek.kernels.lsh.product import COLUMNS, multiply

CHUNK = 1024
LOWEST = np.float32(-1e30)
EXACT = {"contract", "nnan", "ninf", "nsz", "arcp"}  # fast arithmetic, but sums in the order that the code says


@njit
def sorted_pairs(lists, start, stop, num_lists, rows, starts, stops, ends):  # type: ignore[no-untyped-def]
    """Sort a unit's intervals that are not empty by list; `rows` counts its queries and their heads."""
    length, heads, count = lists.shape
    ends[:] = 0
    for t in range(length):
        for r in range(heads):
            for i in range(count):
                ends[lists[t, r, i] + 1] += stop[t, r, i] > start[t, r, i]
    for c in range(num_lists):
        ends[c + 1] += ends[c]
    for t in range(length):
        for r in range(heads):
            for i in range(count):
                if stop[t, r, i] > start[t, r, i]:
                    place = ends[lists[t, r, i]]
                    rows[place], starts[place], stops[place] = t * heads + r, start[t, r, i], stop[t, r, i]
                    ends[lists[t, r, i]] += 1


@njit
def strip_end(first, end, starts, stops, most):  # type: ignore[no-untyped-def]
    """Return the end of the strip that begins with interval `first`: 16 intervals over at most `most` keys."""
    last = first + 1
    while last < min(first + COLUMNS, end) and stops[last] - starts[first] <= most:
        last += 1
    return last


@njit
def gather(x, rows, scale, heads, side):  # type: ignore[no-untyped-def]
    """Set the columns of `side` to the rows of x, scaled; x is `[T, H/G, K]`."""
    for m in range(len(rows)):
        row = x[rows[m] // heads, rows[m] % heads]
        for k in range(len(row)):
            side[k, m] = scale * row[k]


@njit
def hide(scores, count, base, starts, stops):  # type: ignore[no-untyped-def]
    """Make the scores of keys outside each query's interval the lowest; also those of columns without a query."""
    for m in range(len(starts)):
        for j in range(starts[m] - base):
            scores[j, m] = LOWEST
        for j in range(stops[m] - base, count):
            scores[j, m] = LOWEST
    for m in range(len(starts), COLUMNS):
        for j in range(count):
            scores[j, m] = LOWEST


@njit(fastmath=EXACT)
def _soften(scores, count, top, total):  # type: ignore[no-untyped-def]
    """Replace scores by their exponentials below `top`, which rises to the highest; set `total` to their sums."""
    for j in range(count):
        for m in range(COLUMNS):
            top[m] = scores[j, m] if scores[j, m] > top[m] else top[m]
    total[:] = 0
    for j in range(count):
        for m in range(COLUMNS):
            below = scores[j, m] - top[m]
            weight = exp(below) if below > np.float32(-87) else np.float32(0)
            scores[j, m] = weight
            total[m] += weight


@njit(fastmath=EXACT)
def _merge(rows, top, total, part, highest, sums, out, heads):  # type: ignore[no-untyped-def]
    """Add a strip's results to what its queries have gathered so far."""
    for m in range(len(rows)):
        r = rows[m]
        t, h = r // heads, r % heads
        kept = exp(highest[r] - top[m])
        highest[r], sums[r] = top[m], sums[r] * kept + total[m]
        for k in range(out.shape[2]):
            out[t, h, k] = out[t, h, k] * kept + part[m, k]


@njit
def _strip(q, key, value, rows, starts, stops, scale, highest, sums, out, side, scores, part):  # type: ignore[no-untyped-def]
    heads, width = q.shape[1], q.shape[2]
    base = starts[0]
    count = stops[-1] - base
    top, total = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    gather(q, rows, scale, heads, side)
    multiply(
        key[base:].ctypes.data, width, 1, side.ctypes.data, COLUMNS, scores.ctypes.data, COLUMNS, count, COLUMNS, width
    )
    hide(scores, count, base, starts, stops)
    top[:] = LOWEST
    for m in range(len(rows)):
        top[m] = highest[rows[m]]
    _soften(scores, count, top, total)
    multiply(
        scores.ctypes.data, 1, COLUMNS, value[base:].ctypes.data, width, part.ctypes.data, width, COLUMNS, width, count
    )
    _merge(rows, top, total, part, highest, sums, out, heads)


@njit(fastmath=EXACT)
def _divide(out, lse, highest, sums):  # type: ignore[no-untyped-def]
    for r in range(len(sums)):
        t, h = r // out.shape[1], r % out.shape[1]
        lse[t, h] = highest[r] + np.log(max(sums[r], np.float32(1e-37)))
        share = np.float32(1) / max(sums[r], np.float32(1e-37))
        for k in range(out.shape[2]):
            out[t, h, k] *= share


@njit
def _unit(q, key, value, lists, start, stop, num_lists, most, scale, out, lse, side, scores, part):  # type: ignore[no-untyped-def]
    count, queries = lists.size, q.shape[0] * q.shape[1]
    rows, starts, stops = np.empty(count, np.int32), np.empty(count, np.int32), np.empty(count, np.int32)
    highest, sums = np.full(queries, LOWEST, np.float32), np.zeros(queries, np.float32)
    ends = np.empty(num_lists + 1, np.int64)
    sorted_pairs(lists, start, stop, num_lists, rows, starts, stops, ends)
    first = 0
    for c in range(num_lists):
        while first < ends[c]:
            last = strip_end(first, ends[c], starts, stops, most)
            pairs = slice(first, last)
            _strip(
                q, key, value, rows[pairs], starts[pairs], stops[pairs], scale, highest, sums, out, side, scores, part
            )  # fmt: skip
            first = last
    _divide(out, lse, highest, sums)


@njit
def _run(q, key, value, lists, start, stop, num_lists, most, scale, out, lse):  # type: ignore[no-untyped-def]
    batch, length, heads, width = q.shape
    groups = key.shape[1]
    share_of_heads, chunks = heads // groups, (length + CHUNK - 1) // CHUNK
    side, part = np.zeros((width, COLUMNS), np.float32), np.empty((COLUMNS, width), np.float32)
    scores = np.empty((most + SPARE, COLUMNS), np.float32)
    begin, end = share(batch * groups * chunks)
    for unit in range(begin, end):
        b, g, t = unit // (groups * chunks), unit // chunks % groups, unit % chunks * CHUNK
        h, u = slice(g * share_of_heads, (g + 1) * share_of_heads), slice(t, min(t + CHUNK, length))
        _unit(
            q[b, u, h], key[b, g], value[b, g], lists[b, u, h], start[b, u, h], stop[b, u, h], num_lists, most, scale,
            out[b, u, h], lse[b, u, h], side, scores, part,
        )  # fmt: skip


@cache
def _address() -> int:
    @cfunc(types.void(types.CPointer(types.int64)), cache=True)
    def kernel(data):  # type: ignore[no-untyped-def]
        a = carray(data, 18)
        b, t, h, k, g, z, i = a[9], a[10], a[11], a[12], a[13], a[14], a[15]
        _run(
            carray(pointer(a[0]), (b, t, h, k), np.float32), carray(pointer(a[1]), (b, g, z, k), np.float32),
            carray(pointer(a[2]), (b, g, z, k), np.float32), carray(pointer(a[3]), (b, t, h, i), np.int32),
            carray(pointer(a[4]), (b, t, h, i), np.int32), carray(pointer(a[5]), (b, t, h, i), np.int32), a[16], a[17],
            carray(pointer(a[6]), 1, np.float32)[0], carray(pointer(a[7]), (b, t, h, k), np.float32),
            carray(pointer(a[8]), (b, t, h), np.float32),
        )  # fmt: skip

    return int(kernel.address)


def sizes(query_BTHK: Tensor, key_BGZK: Tensor, intervals: Intervals, windows: Windows) -> list[int]:
    """Return the sizes that both kernels need: the dimensions, the number of lists, and the most keys of a strip."""
    dimensions = [*query_BTHK.shape, *key_BGZK.shape[1:3], intervals.start_BTHI.shape[-1]]
    return [*dimensions, windows.num_buckets + 2, min(2 * windows.longest(), key_BGZK.shape[2])]


def forward(
    query_BTHK: Tensor, key_BGZK: Tensor, value_BGZK: Tensor, intervals: Intervals, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """See `tiles.forward`; in fp32 throughout."""
    query, key, value = (part.float().contiguous() for part in (query_BTHK, key_BGZK, value_BGZK))
    out, lse = torch.zeros_like(query), query.new_empty(query.shape[:3])
    places = [part.contiguous() for part in (intervals.list_BTHI, intervals.start_BTHI, intervals.stop_BTHI)]
    tensors = (query, key, value, *places, torch.tensor([scale]), out, lse)
    openmp.parallel(_address(), [t.data_ptr() for t in tensors] + sizes(query, key, intervals, windows))
    return out, lse
