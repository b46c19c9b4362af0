"""Backward pass of one strip: recomputes its weights from the denominators; five matrix products
give the gradients.
"""

import numpy as np

from deepseek.kernels.lsh.product import COLUMNS, ROWS, multiply, multiply_add
from deepseek.kernels.lsh.strip_scores import EXACT, bucket, gather, score, strip_end
from deepseek.kernels.numba.primitives import exp, widen
from deepseek.kernels.numba.subroutine import subroutine


@subroutine(fastmath=True)
def denominators(rows, grad, grad_lse, out, lse, lse_m, dots_m):  # type: ignore[no-untyped-def]
    """Set, for each query, the logarithm of its denominator and the term common to the gradients of
    its scores.
    """
    for m in range(len(rows)):
        t = rows[m] // out.shape[1]
        h = rows[m] % out.shape[1]
        total = -grad_lse[t, h]
        for k in range(out.shape[2]):
            total += widen(grad[t, h, k]) * widen(out[t, h, k])
        lse_m[m] = lse[t, h]
        dots_m[m] = total


@subroutine(fastmath=EXACT)
def _through_softmax(weights, grads, lse_m, dots_m):  # type: ignore[no-untyped-def]
    """Replace scores by weights, and gradients of weights by gradients of scores."""
    for j in range(len(weights)):
        for m in range(COLUMNS):
            below = weights[j, m] - lse_m[m]
            weight = exp(below) if below > np.float32(-87) else np.float32(0)
            weights[j, m] = weight
            grads[j, m] = weight * (grads[j, m] - dots_m[m])


@subroutine(fastmath=EXACT)
def _add_rows(rows, scale, part, target):  # type: ignore[no-untyped-def]
    """Add scaled rows of `part` to the given rows of `target`."""
    for m in range(len(rows)):
        row = target[rows[m] // target.shape[1], rows[m] % target.shape[1]]
        for k in range(len(row)):
            row[k] += scale * part[m, k]


@subroutine
def _add_outer(left, count, x, rows, scale, part, target):  # type: ignore[no-untyped-def]
    """Add to the first rows of `target` the product of `left` `[count, 16]` and the given rows of
    x, scaled.
    """
    part[len(rows) :] = 0
    for m in range(len(rows)):
        row = x[rows[m] // x.shape[1], rows[m] % x.shape[1]]
        for k in range(len(row)):
            part[m, k] = scale * row[k]
    width = x.shape[2]
    multiply_add(
        left.ctypes.data,
        COLUMNS,
        1,
        part.ctypes.data,
        width,
        target.ctypes.data,
        width,
        count,
        width,
        COLUMNS,
    )


@subroutine
def add_bias_gradients(queries, laid, pairs, grads, grad_tables, grad_terms):  # type: ignore[no-untyped-def]
    """Add the gradients of the bias tables and of the keys' terms."""
    (_, ranks, tables, _, _, _), (_, key_ranks, _, _), (rows, starts, stops) = queries, laid, pairs
    for m in range(len(rows)):
        t = rows[m] // tables.shape[1]
        h = rows[m] % tables.shape[1]
        rank = ranks[t]
        grad_table = grad_tables[t, h]
        for j in range(starts[m], stops[m]):
            grad = grads[j - starts[0], m]
            grad_table[bucket(rank - key_ranks[j])] += grad
            grad_terms[j, h] += grad


@subroutine
def _with_values(values, side, changes, count, width):  # type: ignore[no-untyped-def]
    """Set `changes` to the product of `count` values and the gradients of a strip's outputs."""
    multiply(
        values.ctypes.data,
        width,
        1,
        side.ctypes.data,
        COLUMNS,
        changes.ctypes.data,
        COLUMNS,
        count,
        COLUMNS,
        width,
    )


@subroutine
def _with_keys(changes, keys, part, count, width):  # type: ignore[no-untyped-def]
    """Set `part` to the gradients of a strip's queries: the gradients of the scores times `count`
    keys.
    """
    multiply(
        changes.ctypes.data,
        1,
        COLUMNS,
        keys.ctypes.data,
        width,
        part.ctypes.data,
        width,
        COLUMNS,
        width,
        count,
    )


@subroutine
def backward(  # type: ignore[no-untyped-def]
    values, queries, laid, out, lse, pairs, earlier, scale, buffers, grads_out, grads_in, grads_laid
):
    """Add the contribution of one list of keys to the gradients of queries, keys and values."""
    rows, starts, stops = pairs
    side, part, weights, changes = buffers
    q = queries[0]
    keys = laid[0]
    grad, grad_lse = grads_out
    grad_q, grad_tables = grads_in
    grad_keys, grad_values, grad_terms = grads_laid
    width = q.shape[2]
    one = np.float32(1)
    most = len(weights) - ROWS
    lse_m = np.zeros(COLUMNS, np.float32)
    dots_m = np.zeros(COLUMNS, np.float32)
    first = 0
    while first < len(rows):
        last = strip_end(first, starts, stops, most)
        base = starts[first]
        count = stops[last - 1] - starts[first]
        strip = rows[first:last], starts[first:last], stops[first:last]
        strip_rows = strip[0]
        gather(grad, strip_rows, one, side)
        _with_values(values[base:], side, changes, count, width)
        gather(q, strip_rows, scale, side)
        score(queries, laid, strip, earlier, side, weights)
        denominators(strip_rows, grad, grad_lse, out, lse, lse_m, dots_m)
        _through_softmax(weights[:count], changes[:count], lse_m, dots_m)
        if grad_tables.shape[2] > 0:
            add_bias_gradients(queries, laid, strip, changes, grad_tables, grad_terms)
        weights[count : count + ROWS] = 0
        changes[count : count + ROWS] = 0
        _with_keys(changes, keys[base:], part, count, width)
        _add_rows(strip_rows, scale, part, grad_q)
        _add_outer(changes, count, q, strip_rows, scale, part, grad_keys[base:])
        _add_outer(weights, count, grad, strip_rows, one, part, grad_values[base:])
        first = last
