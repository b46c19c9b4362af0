"""Attention over intervals on a processor: 16 queries at a time, side by side in the lanes of its vectors.

A unit of work is a stretch of `CHUNK` queries of one key/value head, with all heads that share it. Its intervals are
sorted into their lists; the keys of a list are copied together once, and 16 neighbouring intervals form a strip, which
walks over nearly the same of them (`strip_forward.py`, `strip_backward.py`). A query belongs to one unit, so results
need no locks. Gradients of keys come from many units: each thread has its own, over the stretch of time it works on.
"""

from functools import cache
from math import gcd

import numpy as np
import torch
from numba import cfunc, njit
from torch import Tensor

from deepseek.kernels.few_tokens import share
from deepseek.kernels.few_tokens_backward import untouched_zeros
from deepseek.kernels.launch import ARGUMENTS, launch, unpack
from deepseek.kernels.lsh import strip_backward, strip_forward
from deepseek.kernels.lsh.intervals import Intervals, Windows
from deepseek.kernels.lsh.product import COLUMNS, ROWS

CHUNK = 512
MOST_LANES = 4  # of gradients of keys and values, which each take as much memory as these

_backward, _forward, _divide = strip_backward.backward, strip_forward.forward, strip_forward.divide


@njit
def _sorted(codes, start, stop, num_lists):  # type: ignore[no-untyped-def]
    """Return query, start and stop of all intervals that are not empty, sorted by list, and the end of each list.

    The first list is the local one, the others are the buckets, the sinks last.
    """
    heads, length, count = start.shape
    rows, starts, stops = np.empty(start.size, np.int32), np.empty(start.size, np.int32), np.empty(start.size, np.int32)
    ends = np.zeros(num_lists + 1, np.int64)
    for filling in (False, True):
        for t in range(length):
            for r in range(heads):
                for i in range(count):
                    if stop[r, t, i] > start[r, t, i]:
                        c = codes[r, t, i - 2] + 1 if i > 1 else i * (num_lists - 1)
                        if filling:
                            place = ends[c]
                            rows[place], starts[place], stops[place] = t * heads + r, start[r, t, i], stop[r, t, i]
                        ends[c if filling else c + 1] += 1
        if not filling:
            for c in range(num_lists):
                ends[c + 1] += ends[c]
    return rows, starts, stops, ends


@njit
def _load(x, places, keys):  # type: ignore[no-untyped-def]
    for j in range(len(places)):
        keys[j] = x[places[j]]


@njit
def _store(keys, places, x):  # type: ignore[no-untyped-def]
    for j in range(len(places)):
        x[places[j]] += keys[j]


@njit
def _unit(views, places, order, grads, buffers, num_lists, scale, backwards):  # type: ignore[no-untyped-def]
    """All lists of one unit, forward or backward."""
    (q, key, value, out, lse), (grad, grad_q, grad_key, grad_value) = views, grads
    keys, values, grad_keys, grad_values, small = buffers
    rows, starts, stops, ends = _sorted(places[0], places[1], places[2], num_lists)
    highest, sums = np.full(lse.size, strip_forward.LOWEST, np.float32), np.zeros(lse.size, np.float32)
    first = 0
    for c in range(num_lists):
        if ends[c] == first:
            continue
        own, base = slice(first, ends[c]), starts[first]
        pairs = rows[own], starts[own] - base, stops[own] - base
        laid, first = order[base : stops[ends[c] - 1]], ends[c]
        _load(key, laid, keys)
        _load(value, laid, values)
        if backwards:
            grad_keys[: len(laid) + ROWS], grad_values[: len(laid) + ROWS] = 0, 0
            _backward(q, keys, values, out, lse, pairs, scale, small, grad, grad_q, grad_keys, grad_values)
            _store(grad_keys, laid, grad_key)
            _store(grad_values, laid, grad_value)
        else:
            _forward(q, keys, values, out, pairs, scale, small, highest, sums)
    if not backwards:
        _divide(out, lse, highest, sums)


@njit
def _run(  # type: ignore[no-untyped-def]
    q, key, value, out, lse, order, codes, start, stop, grad, grad_q, grad_key, grad_value, scale, num_lists, longest,
    backwards,
):  # fmt: skip
    (batch, length, heads, width), groups, lanes = q.shape, key.shape[2], len(grad_key)
    own, chunks = heads // groups, (length + CHUNK - 1) // CHUNK
    most, narrow = (CHUNK + longest + ROWS, width), (2 * longest + ROWS, COLUMNS)  # keys of a list, and of a strip
    small = (
        np.zeros((width, COLUMNS), np.float32), np.empty((COLUMNS, width), np.float32), np.empty(narrow, np.float32),
        np.empty(narrow, np.float32),
    )  # fmt: skip
    buffers = (
        np.zeros(most, np.float32), np.zeros(most, np.float32), np.empty(most, np.float32), np.empty(most, np.float32),
        small,
    )  # fmt: skip
    begin, end = share(batch * groups * lanes)
    for unit in range(begin, end):
        b, g, lane = unit // (groups * lanes), unit // lanes % groups, unit % lanes
        h = slice(g * own, (g + 1) * own)
        for chunk in range(lane * chunks // lanes, (lane + 1) * chunks // lanes):
            u = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, length))
            views = q[b, u, h], key[b, :, g], value[b, :, g], out[b, u, h], lse[b, u, h]
            spans = codes[b, h, u], start[b, h, u], stop[b, h, u]
            mine = grad[b, u, h], grad_q[b, u, h], grad_key[lane, b, :, g], grad_value[lane, b, :, g]
            _unit(views, spans, order[b, g], mine, buffers, num_lists, scale[0], backwards != 0)


@cache
def _kernel(kinds: str) -> int:
    @cfunc(ARGUMENTS, cache=True)
    def kernel(data):  # type: ignore[no-untyped-def]
        _run(*unpack(data, kinds))

    return int(kernel.address)


def _call(
    arrays: list[Tensor], intervals: Intervals, grads: list[Tensor], windows: Windows, scale: float, backwards: bool
) -> None:
    places = (intervals.order_BGZ, intervals.codes_BHTP, intervals.start_BHTI, intervals.stop_BHTI)
    limits = (windows.num_buckets + 2, min(windows.longest(), arrays[1].shape[1]), int(backwards))
    contiguous = (part.contiguous() for part in places)
    launch(_kernel, *arrays, *contiguous, *grads, torch.tensor([scale]), *limits)


def _by_token(x_BHTK: Tensor) -> Tensor:
    return x_BHTK.transpose(1, 2).float().contiguous()


def forward(
    query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, intervals: Intervals, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """See `tiles.forward`; in fp32 throughout."""
    query, key, value = (_by_token(part) for part in (query_BHTK, key_BGSK, value_BGSK))
    out, lse = torch.zeros_like(query), query.new_empty(query.shape[:3])
    lanes = key[None].expand(-(-query.shape[1] // CHUNK), *key.shape)  # any address will do for what is not touched
    _call([query, key, value, out, lse], intervals, [query, query, lanes, lanes], windows, scale, False)
    return out.transpose(1, 2), lse.transpose(1, 2)


def backward(
    grad_BHTK: Tensor, query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, out_BHTK: Tensor, lse_BHT: Tensor,
    intervals: Intervals, windows: Windows, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `tiles.backward`; in fp32 throughout."""
    arrays = [_by_token(part) for part in (query_BHTK, key_BGSK, value_BGSK, out_BHTK, lse_BHT)]
    threads, heads = torch.get_num_threads(), key_BGSK.shape[0] * key_BGSK.shape[1]
    lanes = min(threads // gcd(threads, heads), MOST_LANES, -(-query_BHTK.shape[2] // CHUNK))  # all equally busy
    grad_keys = [untouched_zeros(torch.Size((lanes, *arrays[1].shape)), torch.float32) for _ in range(2)]
    grad_query = torch.zeros_like(arrays[0])
    _call(arrays, intervals, [_by_token(grad_BHTK), grad_query, *grad_keys], windows, scale, True)
    for lane in range(lanes - 1):
        for part in grad_keys:
            part[-1] += part[lane]
    grad_key, grad_value = (part[-1].transpose(1, 2) for part in grad_keys)
    return grad_query.transpose(1, 2), grad_key, grad_value
