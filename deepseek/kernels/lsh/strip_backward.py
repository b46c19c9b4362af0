"""One strip backward: its weights are computed again from the denominators, and five products make the gradients."""

import numpy as np
from numba import njit

from deepseek.kernels.lsh.product import COLUMNS, ROWS, multiply, multiply_add
from deepseek.kernels.lsh.strip_scores import EXACT, bucket, gather, score, strip_end
from deepseek.kernels.numba.primitives import exp


@njit(fastmath=True)
def _denominators(rows, grad, grad_lse, out, lse, lse_m, dots_m):  # type: ignore[no-untyped-def]
    """Set for each query the logarithm of its denominator, and what all gradients of its weights have in common."""
    for m in range(len(rows)):
        t, h = rows[m] // out.shape[1], rows[m] % out.shape[1]
        total = -grad_lse[t, h]
        for k in range(out.shape[2]):
            total += grad[t, h, k] * out[t, h, k]
        lse_m[m], dots_m[m] = lse[t, h], total


@njit(fastmath=EXACT)
def _through_softmax(weights, grads, lse_m, dots_m):  # type: ignore[no-untyped-def]
    """From scores to weights, and from the gradient of weights to that of scores."""
    for j in range(len(weights)):
        for m in range(COLUMNS):
            below = weights[j, m] - lse_m[m]
            weight = exp(below) if below > np.float32(-87) else np.float32(0)
            weights[j, m] = weight
            grads[j, m] = weight * (grads[j, m] - dots_m[m])


@njit(fastmath=EXACT)
def _add_rows(rows, scale, part, target):  # type: ignore[no-untyped-def]
    for m in range(len(rows)):
        row = target[rows[m] // target.shape[1], rows[m] % target.shape[1]]
        for k in range(len(row)):
            row[k] += scale * part[m, k]


@njit
def _add_outer(left, count, x, rows, scale, part, target):  # type: ignore[no-untyped-def]
    """Add to the first rows of `target` the products of `left` `[count, 16]` with the given rows of x, scaled."""
    part[len(rows) :] = 0
    for m in range(len(rows)):
        row = x[rows[m] // x.shape[1], rows[m] % x.shape[1]]
        for k in range(len(row)):
            part[m, k] = scale * row[k]
    width = x.shape[2]
    multiply_add(
        left.ctypes.data, COLUMNS, 1, part.ctypes.data, width, target.ctypes.data, width, count, width, COLUMNS
    )


@njit
def _add_bias_gradients(queries, laid, pairs, grads, grad_tables, grad_terms):  # type: ignore[no-untyped-def]
    (_, ranks, tables, _, _, _), (_, key_ranks, _, _), (rows, starts, stops) = queries, laid, pairs
    for m in range(len(rows)):
        t, h = rows[m] // tables.shape[1], rows[m] % tables.shape[1]
        rank, grad_table = ranks[t], grad_tables[t, h]
        for j in range(starts[m], stops[m]):
            grad = grads[j - starts[0], m]
            grad_table[bucket(rank - key_ranks[j])] += grad
            grad_terms[j, h] += grad


@njit
def backward(queries, laid, values, out, lse, pairs, earlier, scale, buffers, grads_out, grads_in, grads_laid):  # type: ignore[no-untyped-def]
    """Add to the gradients of queries, and of the keys and values of one list, what its intervals contribute."""
    (rows, starts, stops), (side, part, weights, changes), (q, keys) = pairs, buffers, (queries[0], laid[0])
    (grad, grad_lse), (grad_q, grad_tables), (grad_keys, grad_values, grad_terms) = grads_out, grads_in, grads_laid
    width, one, most = q.shape[2], np.float32(1), len(weights) - ROWS
    lse_m, dots_m = np.zeros(COLUMNS, np.float32), np.zeros(COLUMNS, np.float32)
    first = 0
    while first < len(rows):
        last = strip_end(first, starts, stops, most)
        base, count = starts[first], stops[last - 1] - starts[first]
        strip = rows[first:last], starts[first:last], stops[first:last]
        mine, key, value = strip[0], keys[base:].ctypes.data, values[base:].ctypes.data
        gather(grad, mine, one, side)
        multiply(value, width, 1, side.ctypes.data, COLUMNS, changes.ctypes.data, COLUMNS, count, COLUMNS, width)
        gather(q, mine, scale, side)
        score(queries, laid, strip, earlier, side, weights)
        _denominators(mine, grad, grad_lse, out, lse, lse_m, dots_m)
        _through_softmax(weights[:count], changes[:count], lse_m, dots_m)
        if grad_tables.shape[2] > 0:
            _add_bias_gradients(queries, laid, strip, changes, grad_tables, grad_terms)
        weights[count : count + ROWS], changes[count : count + ROWS] = 0, 0
        multiply(changes.ctypes.data, 1, COLUMNS, key, width, part.ctypes.data, width, COLUMNS, width, count)
        _add_rows(mine, scale, part, grad_q)
        _add_outer(changes, count, q, mine, scale, part, grad_keys[base:])
        _add_outer(weights, count, grad, mine, one, part, grad_values[base:])
        first = last
