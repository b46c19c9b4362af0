"""Forward pass of one strip: up to 16 queries, as columns of small matrices, over one range of
keys.
"""

import numpy as np

from deepseek.kernels.lsh.product import COLUMNS, ROWS, multiply
from deepseek.kernels.lsh.strip_scores import EXACT, LOWEST, gather, score, strip_end
from deepseek.kernels.numba.primitives import exp
from deepseek.kernels.numba.subroutine import subroutine


@subroutine(fastmath=EXACT)
def _soften(scores, top, total):  # type: ignore[no-untyped-def]
    """Raise `top` to the highest score, replace scores by exp(score - top), and set `total` to
    their sums.
    """
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


@subroutine(fastmath=EXACT)
def _merge(rows, top, total, part, highest, sums, out):  # type: ignore[no-untyped-def]
    """Merge a strip's results into the running results of its queries (online softmax)."""
    for m in range(len(rows)):
        r = rows[m]
        rescale = exp(highest[r] - top[m])
        highest[r] = top[m]
        sums[r] = sums[r] * rescale + total[m]
        target = out[r // out.shape[1], r % out.shape[1]]
        for k in range(len(target)):
            target[k] = target[k] * rescale + part[m, k]


@subroutine
def forward(values, queries, laid, out, pairs, earlier, scale, buffers, highest, sums):  # type: ignore[no-untyped-def]
    """Add the contribution of one list of keys to the queries' outputs and denominators."""
    (rows, starts, stops), (side, part, scores, _), width = pairs, buffers, values.shape[1]
    top = np.empty(COLUMNS, np.float32)
    total = np.empty(COLUMNS, np.float32)
    first = 0
    while first < len(rows):
        last = strip_end(first, starts, stops, len(scores) - ROWS)
        base = starts[first]
        count = stops[last - 1] - starts[first]
        strip = rows[first:last], starts[first:last], stops[first:last]
        gather(queries[0], strip[0], scale, side)
        score(queries, laid, strip, earlier, side, scores)
        top[:] = LOWEST
        for m in range(last - first):
            top[m] = highest[rows[first + m]]
        _soften(scores[:count], top, total)
        value = values[base:].ctypes.data
        multiply(
            scores.ctypes.data,
            1,
            COLUMNS,
            value,
            width,
            part.ctypes.data,
            width,
            COLUMNS,
            width,
            count,
        )
        _merge(strip[0], top, total, part, highest, sums, out)
        first = last


@subroutine(fastmath=EXACT)
def divide(out, lse, highest, sums, _buffers):  # type: ignore[no-untyped-def]
    """Divide outputs by their denominators, and store the logarithms of the denominators."""
    for r in range(len(sums)):
        t = r // out.shape[1]
        h = r % out.shape[1]
        total = max(sums[r], np.float32(1e-37))  # zero where a query has no candidates
        lse[t, h] = highest[r] + np.log(total)
        for k in range(out.shape[2]):
            out[t, h, k] /= total
