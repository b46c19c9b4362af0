"""Attention of new tokens over the pages of their sequences, in bf16 with fp32 sums."""

import numpy as np
from numba import carray, njit

from deepseek.kernels.decode.rows import round_group
from deepseek.kernels.decode.state import PAGE
from deepseek.kernels.decode.vector import arrive, bfloat16, pair_dot_1, pair_dot_2, pair_dot_3, pair_dot_6
from deepseek.kernels.few_tokens import exp, pointer, share, thread_number
from deepseek.kernels.int8 import GROUP

QUERIES = 6  # most queries of a unit: with four vectors each they fill the registers


@njit(error_model="numpy")
def plane(pages, chunk, page, layer, group, kind, groups, width):  # type: ignore[no-untyped-def]
    """Return the address of the keys (kind 0) `[K/2, 64, 2]` or values (kind 1) `[K/64, 32, 64, 2]` of a page."""
    return pages[chunk, page] + ((layer * groups + group) * 2 + kind) * width * PAGE * 2


@njit(fastmath=True, error_model="numpy")
def _turn(x, cosine, sine, norm, eps, factor, out):  # type: ignore[no-untyped-def]
    """Set `out` to a head's x `[K]`, normed if `norm` is not empty, rotated to its position, times `factor`."""
    half = len(cosine)
    scale = np.float32(1)
    if len(norm):
        total = np.float32(0)
        for k in range(2 * half):
            total += x[k] * x[k]
        scale /= np.sqrt(total / np.float32(2 * half) + eps)
        for k in range(2 * half):
            x[k] *= scale * norm[k]
    for k in range(half):
        out[k] = (x[k] * cosine[k] - x[half + k] * sine[k]) * factor
        out[half + k] = (x[half + k] * cosine[k] + x[k] * sine[k]) * factor


@njit(error_model="numpy")
def place_heads(weights, batch, work, layer):  # type: ignore[no-untyped-def]
    """Rotate queries and keys, and put keys and values into their pages."""
    heads, groups, width = weights.sizes[2], weights.sizes[3], weights.sizes[4]
    parts, turned, bias = heads + 2 * groups, np.empty(width, np.float32), weights.qkv_bias[layer]
    first, last = share(len(batch.ids) * parts)
    for item in range(first, last):
        r, part = item // parts, item % parts
        position, chunk = batch.positions[r], batch.chunk[r]
        x = work.projected[r, part * width : (part + 1) * width]
        for k in range(width):
            x[k] += bias[part * width + k]
        cosine, sine = weights.cosine[position], weights.sine[position]
        page, slot = position // PAGE, position % PAGE
        if part < heads:
            factor = np.float32(1 / np.sqrt(width))
            _turn(x, cosine, sine, weights.head_norms[layer, 0], weights.eps[0], factor, turned)
            rest = heads // groups
            for k in range(width):
                work.queries[part // rest, r, part % rest, k] = bfloat16(turned[k])
        elif part < heads + groups:
            _turn(x, cosine, sine, weights.head_norms[layer, 1], weights.eps[0], np.float32(1), turned)
            at = plane(batch.pages, chunk, page, layer, part - heads, 0, groups, width)
            keys = carray(pointer(at), (width // 2, PAGE, 2), np.uint16)
            for k in range(width):
                keys[k // 2, slot, k % 2] = bfloat16(turned[k])
        else:
            at = plane(batch.pages, chunk, page, layer, part - heads - groups, 1, groups, width)
            values = carray(pointer(at), (width // GROUP, PAGE // 2, GROUP, 2), np.uint16)
            for k in range(width):
                values[k // GROUP, slot // 2, k % GROUP, slot % 2] = bfloat16(x[k])


@njit(error_model="numpy")
def _pairs(a, a_stride, b, n, c, c_stride, count):  # type: ignore[no-untyped-def]
    """Add A B to C for `count` rows (see `vector.py`)."""
    i = 0
    while i + 6 <= count:
        pair_dot_6(a + i * a_stride, a_stride, b, n, c + i * c_stride, c_stride)
        i += 6
    if i + 3 <= count:
        pair_dot_3(a + i * a_stride, a_stride, b, n, c + i * c_stride, c_stride)
        i += 3
    if i + 2 <= count:
        pair_dot_2(a + i * a_stride, a_stride, b, n, c + i * c_stride, c_stride)
        i += 2
    if i < count:
        pair_dot_1(a + i * a_stride, a_stride, b, n, c + i * c_stride, c_stride)


@njit(fastmath=True, error_model="numpy")
def _softmax(scores, shares, low, high):  # type: ignore[no-untyped-def]
    """Fill `shares` with the exponentials of scores low to high - 1, zeros elsewhere; return one over their sum."""
    largest = scores[low]
    for s in range(low, high):
        largest = max(largest, scores[s])
    total = np.float32(0)
    shares[:low] = 0
    for s in range(low, high):
        value = exp(scores[s] - largest)
        total += value
        shares[s] = bfloat16(value)
    shares[high:] = 0
    return np.float32(1) / total


@njit(error_model="numpy")
def _unit(weights, batch, work, layer, chunk, group, start, count):  # type: ignore[no-untyped-def]
    """Attend from queries `start` to `start + count - 1` of a group's, tokens first, to what they may see."""
    groups, width = weights.sizes[3], weights.sizes[4]
    rest = weights.sizes[2] // groups
    row = batch.first[chunk]
    past = batch.positions[row] + 1
    ends = past + (start + count - 1) // rest
    window = weights.windows[layer]
    low = max(0, past + start // rest - window) // PAGE if window else 0
    pages, base = (ends + PAGE - 1) // PAGE, low * PAGE
    span = pages * PAGE - base
    scores, shares = work.weighed[thread_number()], work.shares[thread_number()]
    queries = work.queries[group].ctypes.data + ((row * rest) + start) * width * 2
    scores[:count, :span] = 0
    for page in range(low, pages):
        keys = plane(batch.pages, chunk, page, layer, group, 0, groups, width)
        at = scores.ctypes.data + (page * PAGE - base) * 4
        _pairs(queries, width * 2, keys, width // 2, at, scores.shape[1] * 4, count)
    factors = np.empty(QUERIES, np.float32)
    for i in range(count):
        end = past + (start + i) // rest
        first = max(0, end - window) if window else 0
        factors[i] = _softmax(scores[i, :span], shares[i, :span], first - base, end - base)
    attended = np.zeros((QUERIES, width), np.float32)
    for page in range(low, pages):
        values = plane(batch.pages, chunk, page, layer, group, 1, groups, width)
        at, pairs = shares.ctypes.data + (page * PAGE - base) * 2, min(PAGE // 2, (ends - page * PAGE + 1) // 2)
        for part in range(width // GROUP):
            block = values + part * PAGE * GROUP * 2
            out = attended.ctypes.data + part * GROUP * 4
            _pairs(at, shares.shape[1] * 2, block, pairs, out, width * 4, count)
    for i in range(count):
        head, token = group * rest + (start + i) % rest, row + (start + i) // rest
        for k in range(width):
            attended[i, k] *= factors[i]
        for part in range(width // GROUP):
            x = attended[i].ctypes.data + part * GROUP * 4
            place = head * (width // GROUP) + part
            round_group(x, work.tables[1, token], place, weights.sizes[2] * width // GROUP)


@njit(error_model="numpy")
def attend(weights, batch, work, layer):  # type: ignore[no-untyped-def]
    """Take units of attention, whose costs differ, until none is left; the longest come first."""
    groups, rest = weights.sizes[3], weights.sizes[2] // weights.sizes[3]
    counter = work.sync[8 * (1 + layer) :].ctypes.data
    total = batch.units[len(batch.units) - 1]
    unit = arrive(counter, 1)
    chunk = 0
    while unit < total:
        while batch.units[chunk + 1] <= unit:
            chunk += 1
        queries = (batch.first[chunk + 1] - batch.first[chunk]) * rest
        blocks = (batch.units[chunk + 1] - batch.units[chunk]) // groups
        place = unit - batch.units[chunk]
        start = (blocks - 1 - place // groups) * batch.block[0]
        count = min(batch.block[0], queries - start)
        _unit(weights, batch, work, layer, chunk, place % groups, start, count)
        unit = arrive(counter, 1)
