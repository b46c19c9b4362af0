"""One strip backward: its weights are computed again from the denominators, and five products make the gradients."""

import numpy as np
from numba import njit

from deepseek.kernels.few_tokens import exp
from deepseek.kernels.lsh.product import COLUMNS, ROWS, multiply, multiply_add
from deepseek.kernels.lsh.strip_forward import EXACT, gather, score, strip_end


@njit(fastmath=True)
def _denominators(rows, grad, out, lse, lse_m, dots_m):  # type: ignore[no-untyped-def]
    """Set for each query the logarithm of its denominator, and the product of its output with that one's gradient."""
    for m in range(len(rows)):
        t, h = rows[m] // out.shape[1], rows[m] % out.shape[1]
        total = np.float32(0)
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
def backward(q, keys, values, out, lse, pairs, scale, buffers, grad, grad_q, grad_keys, grad_values):  # type: ignore[no-untyped-def]
    """Add to the gradients of queries, and of the keys and values of one list, what its intervals contribute."""
    (rows, starts, stops), (side, part, weights, grads) = pairs, buffers
    width, one, most = q.shape[2], np.float32(1), len(weights) - ROWS
    lse_m, dots_m = np.zeros(COLUMNS, np.float32), np.zeros(COLUMNS, np.float32)
    first = 0
    while first < len(rows):
        last = strip_end(first, starts, stops, most)
        own, base, count = slice(first, last), starts[first], stops[last - 1] - starts[first]
        mine, key, value = rows[own], keys[base:].ctypes.data, values[base:].ctypes.data
        gather(grad, mine, one, side)
        multiply(value, width, 1, side.ctypes.data, COLUMNS, grads.ctypes.data, COLUMNS, count, COLUMNS, width)
        gather(q, mine, scale, side)
        score(keys, side, starts[own], stops[own], weights)
        _denominators(mine, grad, out, lse, lse_m, dots_m)
        _through_softmax(weights[:count], grads[:count], lse_m, dots_m)
        weights[count : count + ROWS], grads[count : count + ROWS] = 0, 0
        multiply(grads.ctypes.data, 1, COLUMNS, key, width, part.ctypes.data, width, COLUMNS, width, count)
        _add_rows(mine, scale, part, grad_q)
        _add_outer(grads, count, q, mine, scale, part, grad_keys[base:])
        _add_outer(weights, count, grad, mine, one, part, grad_values[base:])
        first = last
