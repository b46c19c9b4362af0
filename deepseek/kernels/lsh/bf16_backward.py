"""Backward pass of one list of keys in bf16: weights are recomputed from the denominators."""

import numpy as np

from deepseek.kernels.lsh.bf16_product import BLOCK, multiply, pair, whole_blocks
from deepseek.kernels.lsh.bf16_rows import accumulate, clear, through_softmax
from deepseek.kernels.lsh.bf16_scores import (
    gather,
    lay_pairs,
    lay_words,
    score,
    strip_range,
    with_pairs,
    with_words,
)
from deepseek.kernels.lsh.strip_backward import add_bias_gradients, denominators
from deepseek.kernels.numba.subroutine import subroutine
from deepseek.kernels.numba.transpose import transpose


@subroutine
def _weigh(strip, base, columns, scale, lse_m, dots_m, space):  # type: ignore[no-untyped-def]
    """Set the weights of a strip and the gradients of its scores, both zero outside the
    intervals.
    """
    _, starts, stops = strip
    for m in range(BLOCK):
        clear(space.weights + 2 * m * space.columns, columns)
        clear(space.narrow + 2 * m * space.columns, columns)
        if m < len(starts):
            place = m * space.columns + starts[m] - base
            through_softmax(
                space.scores + 4 * place,
                space.changes + 4 * place,
                stops[m] - starts[m],
                lse_m[m],
                dots_m[m],
                scale,
                space.weights + 2 * place,
                space.narrow + 2 * place,
            )


@subroutine
def _add_outer(left, side, columns, space, target):  # type: ignore[no-untyped-def]
    """Add to the first rows of `target` the product of the transpose of `left` `[BLOCK, columns]`
    and `side` `[BLOCK, W]`.
    """
    pair(left, 2 * space.columns, space.paired, 4 * space.columns, BLOCK, columns)
    transpose(space.paired, 4 * space.columns, space.transposed, 2 * BLOCK, BLOCK // 2, columns)
    pair(side, 2 * space.width, space.paired_rows, 4 * space.width, BLOCK, space.width)
    multiply(
        space.transposed,
        2 * BLOCK,
        space.paired_rows,
        4 * space.width,
        target,
        4 * space.width,
        (columns, space.width, BLOCK),
        1,
        space.tiled,
    )


@subroutine
def backward(  # type: ignore[no-untyped-def]
    values, queries, laid, out, lse, pairs, earlier, scale, space, grads_out, grads_in, grads_laid
):
    """Add the contribution of one list of keys to the gradients of queries, keys and values."""
    rows, starts, stops = pairs
    grad, grad_lse = grads_out
    grad_q, grad_tables = grads_in
    grad_keys, grad_values, grad_terms = grads_laid
    lse_m = np.zeros(BLOCK, np.float32)
    dots_m = np.zeros(BLOCK, np.float32)
    lay_words(laid[0], stops[-1], space, space.key_words)
    lay_words(values, stops[-1], space, space.value_words)
    lay_pairs(laid[0], stops[-1], space, space.key_pairs)
    first = 0
    while first < len(rows):
        last, base = strip_range(first, starts, stops, space.columns - BLOCK)
        count = last - first
        columns = whole_blocks(stops[last - 1] - base)
        strip = rows[first:last], starts[first:last], stops[first:last]
        gather(grad, strip[0], space, space.grads)
        with_words(space.grads, space.value_words, base, count, columns, space, space.changes)
        score(queries, laid, strip, earlier, base, columns, scale, space)
        denominators(strip[0], grad, grad_lse, out, lse, lse_m, dots_m)
        _weigh(strip, base, columns, scale, lse_m, dots_m, space)
        if grad_tables.shape[2] > 0:
            by_key = space.change_array[:, starts[first] - base :].T
            add_bias_gradients(queries, laid, strip, by_key, grad_tables, grad_terms)
        with_pairs(space.narrow, space.key_pairs, base, count, columns, space)
        _add_rows(strip[0], space, grad_q)
        offset = 4 * space.width * base
        _add_outer(space.narrow, space.queries, columns, space, grad_keys.ctypes.data + offset)
        _add_outer(space.weights, space.grads, columns, space, grad_values.ctypes.data + offset)
        first = last


@subroutine
def _add_rows(rows, space, target):  # type: ignore[no-untyped-def]
    """Add the first rows of `space.part` to the given rows of `target`."""
    start = target.ctypes.data
    for m in range(len(rows)):
        t = rows[m] // target.shape[1]
        h = rows[m] % target.shape[1]
        row = start + t * target.strides[0] + h * target.strides[1]
        source = space.part + 4 * space.width * m
        accumulate(row, np.float32(1), source, target.shape[2])
