"""The far field of LSH attention in the compiled step (see `kernels/lsh/far_field.py`).

A full page holds the sums of its keys and values and of all before it, so that a summary of any
number of pages is one difference.
"""

import numpy as np
from numba import carray

from deepseek.compiled.abi import PAGE
from deepseek.compiled.pages import layer_address, token_row
from deepseek.kernels.numba.primitives import pointer, share, widen
from deepseek.kernels.numba.subroutine import subroutine

PER_LEVEL = 2  # minimum number of summaries of each size, as in the reference
SUMMARIES = 3 * 40  # more than any number of pages has


@subroutine(error_model="numpy")
def _sums(weights, batch, chunk, page, layer, group):  # type: ignore[no-untyped-def]
    """Return the sums `[2, K]` of the keys and of the values up to the end of a page."""
    width = weights.page_width
    place = layer_address(batch, chunk, page, layer) + batch.sums_start + group * 2 * width * 8
    return carray(pointer(place), (2, width), np.float64)


@subroutine(error_model="numpy")
def _start(sums, before, follows):  # type: ignore[no-untyped-def]
    """Set `sums` to those of the page before, or to 0 for the first page."""
    for side in range(2):
        for k in range(sums.shape[1]):
            sums[side, k] = before[side, k] if follows else 0.0


@subroutine(error_model="numpy")
def _add_tokens(sums, rows):  # type: ignore[no-untyped-def]
    for t in range(len(rows)):
        for side in range(2):
            for k in range(sums.shape[1]):
                sums[side, k] += widen(rows[t, side, k])


@subroutine(error_model="numpy")
def place_page_sums(weights, batch, layer):  # type: ignore[no-untyped-def]
    """Compute the sums of the pages that the new tokens fill."""
    first, last = share((len(batch.first_row) - 1) * weights.groups)
    for item in range(first, last):
        chunk = item // weights.groups
        group = item % weights.groups
        start = batch.position_ids[batch.first_row[chunk]]
        stop = start + batch.first_row[chunk + 1] - batch.first_row[chunk]
        for page in range(start // PAGE, stop // PAGE):
            sums = _sums(weights, batch, chunk, page, layer, group)
            before = _sums(weights, batch, chunk, max(page - 1, 0), layer, group)
            _start(sums, before, page > 0)
            place = token_row(weights, batch, chunk, page * PAGE, layer, group)
            _add_tokens(sums, carray(pointer(place), (PAGE, 2, weights.page_width), np.uint16))


@subroutine(error_model="numpy")
def _mean(sums, before, follows, tokens, means):  # type: ignore[no-untyped-def]
    """Set the means over the tokens between two sums."""
    for k in range(len(means)):
        means[k] = np.float32((sums[k] - (before[k] if follows else 0.0)) / tokens)


@subroutine(fastmath=True, error_model="numpy")
def _dot(x, y):  # type: ignore[no-untyped-def]
    """Return the product of bf16 numbers, as uint16, and fp32 numbers."""
    total = np.float32(0)
    for k in range(len(x)):
        total += widen(x[k]) * y[k]
    return total


@subroutine(error_model="numpy")
def summarise(weights, batch, chunk, layer, group, blocks, query, scores, values):  # type: ignore[no-untyped-def]
    """Set the scores and mean values of the summaries of the first `blocks` pages; return their
    number.
    """
    count = 0
    size = 1
    rest = blocks
    key = np.empty(weights.page_width, np.float32)
    while rest > 0:
        left = rest // size
        taken = left
        if left > PER_LEVEL:
            taken = PER_LEVEL + (left - PER_LEVEL) % 2
        for _ in range(taken):
            sums = _sums(weights, batch, chunk, rest - 1, layer, group)
            rest -= size
            before = _sums(weights, batch, chunk, max(rest - 1, 0), layer, group)
            tokens = size * PAGE
            _mean(sums[0], before[0], rest > 0, tokens, key)
            _mean(sums[1], before[1], rest > 0, tokens, values[count])
            scores[count] = _dot(query, key) + np.float32(np.log(tokens))
            count += 1
        size *= 2
    return count
