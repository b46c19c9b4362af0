"""Attention of new tokens over the pages of their sequences, in bf16 with fp32 sums."""

import numpy as np
from numba import carray, njit

from deepseek.compiled.abi import PAGE
from deepseek.compiled.rows import norm_row, round_group
from deepseek.compiled.vector import arrive, pair_dot_1, pair_dot_2, pair_dot_3, pair_dot_6
from deepseek.kernels.int8 import GROUP
from deepseek.kernels.numba.primitives import exp, narrow, pointer, share, thread_number

BFLOAT16 = np.uint16(0)  # what its bits are kept in
QUERIES = 6  # most queries of a unit: with four vectors each they fill the registers


@njit(error_model="numpy")
def plane(pages, chunk, page, layer, group, kind, groups, width):  # type: ignore[no-untyped-def]
    """Return the address of the keys (kind 0) `[K/2, 64, 2]` or values (kind 1) `[K/64, 32, 64, 2]` of a page."""
    return pages[chunk, page] + ((layer * groups + group) * 2 + kind) * width * PAGE * 2


# Numba's loops are turned into vectors only where an index is seen not to be negative: so loops run over whole slices.
@njit(fastmath=True, error_model="numpy")
def _rotate(first, second, cosine, sine, factor, left, right):  # type: ignore[no-untyped-def]
    """Rotate the halves of a head to its position, times `factor`, as bf16."""
    for k in range(len(first)):
        a, b, c, d = first[k], second[k], cosine[k], sine[k]
        left[k], right[k] = narrow((a * c - b * d) * factor, BFLOAT16), narrow((b * c + a * d) * factor, BFLOAT16)


@njit(fastmath=True, error_model="numpy")
def _add(x, bias):  # type: ignore[no-untyped-def]
    for k in range(len(x)):
        x[k] += bias[k]


@njit(error_model="numpy")
def _put_key(turned, page, slot):  # type: ignore[no-untyped-def]
    """Put a key, given as pairs of bf16 numbers `[K/2]`, into its place of a page."""
    keys = carray(pointer(page), (len(turned), PAGE), np.uint32)
    for k in range(len(turned)):
        keys[k, slot] = turned[k]


@njit(error_model="numpy")
def _put_value(x, page, slot):  # type: ignore[no-untyped-def]
    values = carray(pointer(page), (len(x) // GROUP, PAGE // 2, GROUP, 2), np.uint16)
    for part in range(len(x) // GROUP):
        row, own = values[part, slot // 2, :, slot % 2], x[part * GROUP : (part + 1) * GROUP]
        for k in range(len(own)):
            row[k] = narrow(own[k], BFLOAT16)


@njit(error_model="numpy")
def place_heads(weights, batch, work, layer):  # type: ignore[no-untyped-def]
    """Rotate queries and keys, and put keys and values into their pages."""
    heads, groups, width = weights.sizes[2], weights.sizes[3], weights.sizes[4]
    parts, half, rest = heads + 2 * groups, weights.sizes[4] // 2, heads // groups
    turned, scale = np.empty(width, np.uint16), np.float32(1 / np.sqrt(width))
    first, last = share(len(batch.ids) * parts)
    for item in range(first, last):
        r, part = item // parts, item % parts
        position, chunk = batch.positions[r], batch.chunk[r]
        page, slot = position // PAGE, position % PAGE
        x = work.projected[r, part * width : (part + 1) * width]
        _add(x, weights.qkv_bias[layer, part * width : (part + 1) * width])
        if part >= heads + groups:
            _put_value(x, plane(batch.pages, chunk, page, layer, part - heads - groups, 1, groups, width), slot)
            continue
        if weights.head_norms.shape[2]:
            norm_row(x, weights.head_norms[layer, 0 if part < heads else 1], weights.eps[0], x)
        cosine, sine = weights.cosine[position], weights.sine[position]
        if part < heads:
            out = work.queries[part // rest, r, part % rest]
            _rotate(x[:half], x[half:], cosine, sine, scale, out[:half], out[half:])
        else:
            _rotate(x[:half], x[half:], cosine, sine, np.float32(1), turned[:half], turned[half:])
            at = plane(batch.pages, chunk, page, layer, part - heads, 0, groups, width)
            _put_key(turned.view(np.uint32), at, slot)


@njit(error_model="numpy")
def _pairs(a, a_stride, b, n, c, c_stride, count, following):  # type: ignore[no-untyped-def]
    """Add A B to C for `count` rows (see `vector.py`)."""
    i = 0
    while i + 6 <= count:
        pair_dot_6(a + i * a_stride, a_stride, b, n, c + i * c_stride, c_stride, following)
        i += 6
    if i + 3 <= count:
        pair_dot_3(a + i * a_stride, a_stride, b, n, c + i * c_stride, c_stride, following)
        i += 3
    if i + 2 <= count:
        pair_dot_2(a + i * a_stride, a_stride, b, n, c + i * c_stride, c_stride, following)
        i += 2
    if i < count:
        pair_dot_1(a + i * a_stride, a_stride, b, n, c + i * c_stride, c_stride, following)


@njit(fastmath=True, error_model="numpy")
def _softmax(scores, shares):  # type: ignore[no-untyped-def]
    """Fill `shares` with the exponentials of the scores, the largest being 1; return one over their sum."""
    largest = scores[0]
    for s in range(len(scores)):
        largest = max(largest, scores[s])
    total = np.float32(0)
    for s in range(len(scores)):
        value = exp(scores[s] - largest)
        scores[s] = value
        total += value
    for s in range(len(scores)):
        shares[s] = narrow(scores[s], BFLOAT16)
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
        more = page + 1 < pages
        following = plane(batch.pages, chunk, page + 1 if more else low, layer, group, 0 if more else 1, groups, width)
        _pairs(queries, width * 2, keys, width // 2, at, scores.shape[1] * 4, count, following)
    factors = np.empty(QUERIES, np.float32)
    for i in range(count):
        end = past + (start + i) // rest
        first = max(0, end - window) if window else 0
        shares[i, : first - base], shares[i, end - base : span] = 0, 0
        factors[i] = _softmax(scores[i, first - base : end - base], shares[i, first - base : end - base])
    attended = np.zeros((QUERIES, width), np.float32)
    for page in range(low, pages):
        values = plane(batch.pages, chunk, page, layer, group, 1, groups, width)
        step = plane(batch.pages, chunk, min(page + 1, pages - 1), layer, group, 1, groups, width) - values
        at, pairs = shares.ctypes.data + (page * PAGE - base) * 2, min(PAGE // 2, (ends - page * PAGE + 1) // 2)
        for part in range(width // GROUP):
            block = values + part * PAGE * GROUP * 2
            out = attended.ctypes.data + part * GROUP * 4
            _pairs(at, shares.shape[1] * 2, block, pairs, out, width * 4, count, block + step)
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
