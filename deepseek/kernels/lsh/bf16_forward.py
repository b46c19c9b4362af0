"""Forward pass of one list of keys in bf16: strips of up to 32 queries (see `bf16_scores.py`)."""

import numpy as np

from deepseek.kernels.lsh import bf16_rows
from deepseek.kernels.lsh.bf16_product import BLOCK, whole_blocks
from deepseek.kernels.lsh.bf16_rows import accumulate, clear, highest_score, soften
from deepseek.kernels.lsh.bf16_scores import lay_pairs, lay_words, score, strip_range, with_pairs
from deepseek.kernels.numba.primitives import exp
from deepseek.kernels.numba.subroutine import subroutine


@subroutine
def _weigh(strip, base, columns, space, highest, sums, rescales):  # type: ignore[no-untyped-def]
    """Set the weights of a strip, and update the highest score and the sum of each query;
    `rescales` receives the factors of what the queries had before.
    """
    rows, starts, stops = strip
    for m in range(len(rows)):
        r = rows[m]
        place = m * space.columns + starts[m] - base
        count = stops[m] - starts[m]
        top = highest_score(space.scores + 4 * place, count, highest[r])
        clear(space.weights + 2 * m * space.columns, columns)
        total = soften(space.scores + 4 * place, count, top, space.weights + 2 * place)
        rescales[m] = exp(highest[r] - top)
        sums[r] = sums[r] * rescales[m] + total
        highest[r] = top


@subroutine
def forward(values, queries, laid, _out, pairs, earlier, scale, space, highest, sums):  # type: ignore[no-untyped-def]
    """Add the contribution of one list of keys to the queries' outputs and denominators."""
    rows, starts, stops = pairs
    lay_words(laid[0], stops[-1], space, space.key_words)
    lay_pairs(values, stops[-1], space, space.value_pairs)
    rescales = np.empty(BLOCK, np.float32)
    first = 0
    while first < len(rows):
        last, base = strip_range(first, starts, stops, space.columns - BLOCK)
        columns = whole_blocks(stops[last - 1] - base)
        strip = rows[first:last], starts[first:last], stops[first:last]
        score(queries, laid, strip, earlier, base, columns, scale, space)
        _weigh(strip, base, columns, space, highest, sums, rescales)
        with_pairs(space.weights, space.value_pairs, base, last - first, columns, space)
        for m in range(last - first):
            target = space.totals + 4 * space.width * rows[first + m]
            accumulate(target, rescales[m], space.part + 4 * space.width * m, space.width)
        first = last


@subroutine
def divide(out, lse, highest, sums, space):  # type: ignore[no-untyped-def]
    """Store outputs, divided by their denominators, and the logarithms of the denominators."""
    start = out.ctypes.data
    for r in range(len(sums)):
        t = r // out.shape[1]
        h = r % out.shape[1]
        total = max(sums[r], np.float32(1e-37))  # zero where a query has no candidates
        lse[t, h] = highest[r] + np.log(total)
        target = start + t * out.strides[0] + h * out.strides[1]
        bf16_rows.divide(space.totals + 4 * space.width * r, total, target, out.shape[2])
