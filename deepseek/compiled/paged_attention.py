"""Paged attention: new tokens attend to the pages of their sequences, in bf16 with fp32 sums."""

import numpy as np

from deepseek.compiled.abi import PAGE, QUERIES, SYNC_STRIDE
from deepseek.compiled.pages import plane
from deepseek.compiled.rows import put_attended, round_group
from deepseek.compiled.score_bias import add_bias, has_bias
from deepseek.compiled.soft_cap import cap_values
from deepseek.compiled.softmax import softmax
from deepseek.compiled.tile_attention import mix_tiles, score_tiles
from deepseek.compiled.vector import arrive, pair_dot_1, pair_dot_2, pair_dot_3, pair_dot_6
from deepseek.kernels.int8_layout import GROUP
from deepseek.kernels.numba.primitives import share, thread_number
from deepseek.kernels.numba.subroutine import subroutine


@subroutine(error_model="numpy")
def _pairs(a, a_stride, b, n, c, c_stride, count, following):  # type: ignore[no-untyped-def]
    """Add A B to C for `count` rows, with the largest row blocks that fit (see `vector.py`)."""
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


@subroutine(error_model="numpy")
def _score(weights, batch, queries, scores, layer, chunk, group, low, pages, count):  # type: ignore[no-untyped-def]
    """Add to `scores` the products of `count` queries, at address `queries`, with the keys of pages
    `low` to `pages - 1`.

    The next page is prefetched meanwhile; after the last keys, the first values.
    """
    width = weights.width
    for page in range(low, pages):
        keys = plane(weights, batch, chunk, page, layer, group, 0)
        at = scores.ctypes.data + (page - low) * PAGE * 4
        more = page + 1 < pages
        following = plane(
            weights, batch, chunk, page + 1 if more else low, layer, group, 0 if more else 1
        )
        _pairs(queries, width * 2, keys, width // 2, at, scores.shape[1] * 4, count, following)


@subroutine(error_model="numpy")
def _mix(weights, batch, probs, attended, layer, chunk, group, low, ends, count):  # type: ignore[no-untyped-def]
    """Add to `attended` the values at positions `low * PAGE` to `ends - 1`, weighted by `probs`."""
    width = weights.page_width
    pages = (ends + PAGE - 1) // PAGE
    for page in range(low, pages):
        values = plane(weights, batch, chunk, page, layer, group, 1)
        step = plane(weights, batch, chunk, min(page + 1, pages - 1), layer, group, 1) - values
        at = probs.ctypes.data + (page - low) * PAGE * 2
        pairs = min(PAGE // 2, (ends - page * PAGE + 1) // 2)
        for part in range(width // GROUP):
            block = values + part * PAGE * GROUP * 2
            out = attended.ctypes.data + part * GROUP * 4
            _pairs(at, probs.shape[1] * 2, block, pairs, out, width * 4, count, block + step)


@subroutine(error_model="numpy")
def _unit(weights, batch, work, layer, chunk, group, start, count):  # type: ignore[no-untyped-def]
    """Compute one unit of attention: queries `start` to `start + count - 1` of a chunk's group of
    heads.

    Queries are ordered by token, then by head.
    """
    width = weights.width
    group_heads = weights.heads // weights.groups
    row = batch.first_row[chunk]
    past = batch.position_ids[row] + 1
    ends = past + (start + count - 1) // group_heads
    window = weights.windows[layer]
    low = max(0, past + start // group_heads - window) // PAGE if window else 0
    pages = (ends + PAGE - 1) // PAGE
    base = low * PAGE
    span = pages * PAGE - base
    scores = work.attention_scores[thread_number()]
    probs = work.attention_probs[thread_number()]
    queries = work.queries[group].ctypes.data + ((row * group_heads) + start) * width * 2
    if weights.tile_attention:
        score_tiles(weights, batch, queries, scores, layer, chunk, group, low, pages, count)
    else:
        scores[:count, :span] = 0
        _score(weights, batch, queries, scores, layer, chunk, group, low, pages, count)
    factors = np.empty(QUERIES, np.float32)
    biased = has_bias(weights)
    for i in range(count):
        head = group * group_heads + (start + i) % group_heads
        token = row + (start + i) // group_heads
        if biased:
            add_bias(weights, batch, work, layer, chunk, token, head, low, scores[i, :span])
        if weights.score_cap[0] > 0:
            cap_values(scores[i].ctypes.data, span, weights.score_cap[0])
        end = past + (start + i) // group_heads
        first = max(0, end - window) - base if window else 0
        probs[i, :first] = 0
        probs[i, end - base : span] = 0
        factors[i] = softmax(scores[i].ctypes.data, probs[i].ctypes.data, first, end - base)
    attended = work.attended_unit[thread_number()]
    attended[:count] = 0
    if weights.tile_attention:
        mix_tiles(weights, batch, probs, attended, layer, chunk, group, low, ends, count)
    else:
        _mix(weights, batch, probs, attended, layer, chunk, group, low, ends, count)
    for i in range(count):
        head = group * group_heads + (start + i) % group_heads
        token = row + (start + i) // group_heads
        for k in range(width):
            attended[i, k] *= factors[i]
        put_attended(weights, work, token, head, attended[i])


@subroutine(error_model="numpy")
def attend(weights, batch, work, layer):  # type: ignore[no-untyped-def]
    """Compute units of attention until none is left.

    Units differ in cost, so the threads take them from a shared counter, the longest first.
    """
    groups = weights.groups
    group_heads = weights.heads // groups
    counter = work.sync[SYNC_STRIDE * (1 + layer) :].ctypes.data
    total = batch.first_unit[len(batch.first_unit) - 1]
    unit = arrive(counter, 1)
    chunk = 0
    while unit < total:
        while batch.first_unit[chunk + 1] <= unit:
            chunk += 1
        queries = (batch.first_row[chunk + 1] - batch.first_row[chunk]) * group_heads
        blocks = (batch.first_unit[chunk + 1] - batch.first_unit[chunk]) // groups
        place = unit - batch.first_unit[chunk]
        start = (blocks - 1 - place // groups) * batch.unit_queries
        count = min(batch.unit_queries, queries - start)
        _unit(weights, batch, work, layer, chunk, place % groups, start, count)
        unit = arrive(counter, 1)


@subroutine(error_model="numpy")
def round_attended(work, rows):  # type: ignore[no-untyped-def]
    """Quantise the outputs of heads whose width is not a multiple of 64."""
    groups = work.attended.shape[1] // GROUP
    first, last = share(rows)
    for r in range(first, last):
        for g in range(groups):
            x = work.attended[r, g * GROUP :].ctypes.data
            round_group(x, work.attended_rows[r], g, groups)
