"""One strip forward: up to 16 queries, in the columns of small matrices, over one stretch of keys."""

import numpy as np
from numba import njit

from deepseek.kernels.few_tokens import exp
from deepseek.kernels.lsh.product import COLUMNS, ROWS, multiply

LOWEST = np.float32(-1e30)
EXACT = {"contract", "nnan", "ninf", "nsz", "arcp"}  # fast arithmetic, but sums in the order that the code says


@njit
def strip_end(first, starts, stops, most):  # type: ignore[no-untyped-def]
    """Return the end of the strip that begins with interval `first`: up to 16 intervals over at most `most` keys."""
    last = first + 1
    while last < min(first + COLUMNS, len(starts)) and stops[last] - starts[first] <= most:
        last += 1
    return last


@njit
def gather(x, rows, scale, side):  # type: ignore[no-untyped-def]
    """Set the columns of `side` to rows of x `[T, H/G, K]`, counted over T and H/G, times `scale`."""
    for m in range(len(rows)):
        row = x[rows[m] // x.shape[1], rows[m] % x.shape[1]]
        for k in range(len(row)):
            side[k, m] = scale * row[k]


@njit
def score(key, side, starts, stops, scores):  # type: ignore[no-untyped-def]
    """Set `scores[j, m]` to the score of the strip's key j for query m, the lowest outside its interval."""
    base, count = starts[0], stops[-1] - starts[0]
    width = key.shape[1]
    multiply(
        key[base:].ctypes.data, width, 1, side.ctypes.data, COLUMNS, scores.ctypes.data, COLUMNS, count, COLUMNS, width
    )
    for m in range(COLUMNS):
        first, last = (starts[m] - base, stops[m] - base) if m < len(starts) else (count, count)
        for j in range(first):
            scores[j, m] = LOWEST
        for j in range(last, count):
            scores[j, m] = LOWEST


@njit(fastmath=EXACT)
def _soften(scores, top, total):  # type: ignore[no-untyped-def]
    """Replace scores by their exponentials below `top`, which rises to the highest; set `total` to their sums."""
    for j in range(len(scores)):
        for m in range(COLUMNS):
            top[m] = scores[j, m] if scores[j, m] > top[m] else top[m]
    total[:] = 0
    for j in range(len(scores)):
        for m in range(COLUMNS):
            below = scores[j, m] - top[m]
            weight = exp(below) if below > np.float32(-87) else np.float32(0)
            scores[j, m] = weight
            total[m] += weight


@njit(fastmath=EXACT)
def _merge(rows, top, total, part, highest, sums, out):  # type: ignore[no-untyped-def]
    """Add a strip's results to what its queries have gathered so far."""
    for m in range(len(rows)):
        r = rows[m]
        kept = exp(highest[r] - top[m])
        highest[r], sums[r] = top[m], sums[r] * kept + total[m]
        target = out[r // out.shape[1], r % out.shape[1]]
        for k in range(len(target)):
            target[k] = target[k] * kept + part[m, k]


@njit
def forward(q, keys, values, out, pairs, scale, buffers, highest, sums):  # type: ignore[no-untyped-def]
    """Add to outputs and their denominators what the queries see of one list of keys."""
    (rows, starts, stops), (side, part, scores, _), width = pairs, buffers, q.shape[2]
    top, total = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    first = 0
    while first < len(rows):
        last = strip_end(first, starts, stops, len(scores) - ROWS)
        own, base, count = slice(first, last), starts[first], stops[last - 1] - starts[first]
        gather(q, rows[own], scale, side)
        score(keys, side, starts[own], stops[own], scores)
        top[:] = LOWEST
        for m in range(last - first):
            top[m] = highest[rows[first + m]]
        _soften(scores[:count], top, total)
        value = values[base:].ctypes.data
        multiply(scores.ctypes.data, 1, COLUMNS, value, width, part.ctypes.data, width, COLUMNS, width, count)
        _merge(rows[own], top, total, part, highest, sums, out)
        first = last


@njit(fastmath=EXACT)
def divide(out, lse, highest, sums):  # type: ignore[no-untyped-def]
    """Divide outputs by their denominators, and note the logarithms of these."""
    for r in range(len(sums)):
        t, h = r // out.shape[1], r % out.shape[1]
        total = max(sums[r], np.float32(1e-37))  # zero where a query has no candidates
        lse[t, h] = highest[r] + np.log(total)
        for k in range(out.shape[2]):
            out[t, h, k] /= total
