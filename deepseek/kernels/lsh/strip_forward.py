"""One strip forward: up to 16 queries, in the columns of small matrices, over one stretch of keys."""

import numpy as np
from numba import njit

from deepseek.kernels.few_tokens import exp
from deepseek.kernels.lsh.product import COLUMNS, multiply

LOWEST = np.float32(-1e30)
EXACT = {"contract", "nnan", "ninf", "nsz", "arcp"}  # fast arithmetic, but sums in the order that the code says


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


@njit(fastmath=EXACT)
def _divide(out, lse, highest, sums):  # type: ignore[no-untyped-def]
    for r in range(len(sums)):
        t, h = r // out.shape[1], r % out.shape[1]
        total = max(sums[r], np.float32(1e-37))  # zero where a query has no candidates
        lse[t, h] = highest[r] + np.log(total)
        for k in range(out.shape[2]):
            out[t, h, k] /= total


@njit
def forward(views, strips, scale, buffers):  # type: ignore[no-untyped-def]
    """Set outputs, given as zeros, and the logarithms of their denominators, of one unit of work."""
    (q, key, value, out, lse), (rows, starts, stops, bounds), (side, part, scores, _) = views, strips, buffers
    top, total, width = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32), q.shape[2]
    highest, sums = np.full(lse.size, LOWEST, np.float32), np.zeros(lse.size, np.float32)
    for s in range(len(bounds) - 1):
        own = slice(bounds[s], bounds[s + 1])
        base, count = starts[bounds[s]], stops[bounds[s + 1] - 1] - starts[bounds[s]]
        gather(q, rows[own], scale, side)
        score(key, side, starts[own], stops[own], scores)
        top[:] = LOWEST
        for m in range(bounds[s + 1] - bounds[s]):
            top[m] = highest[rows[bounds[s] + m]]
        _soften(scores[:count], top, total)
        multiply(
            scores.ctypes.data, 1, COLUMNS, value[base:].ctypes.data, width, part.ctypes.data, width, COLUMNS, width,
            count,
        )  # fmt: skip
        _merge(rows[own], top, total, part, highest, sums, out)
    _divide(out, lse, highest, sums)
