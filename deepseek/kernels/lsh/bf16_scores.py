"""The scores of one strip in bf16: up to 32 queries, as rows of small matrices, over one range of
keys.

`queries` and `laid` are those of `strip_scores.py`, with vectors of bf16 numbers.
"""

from collections import namedtuple

import numpy as np

from deepseek.kernels.lsh.bf16_product import BLOCK, multiply, pair, whole_blocks
from deepseek.kernels.lsh.bf16_rows import clear, copy, scale_row
from deepseek.kernels.lsh.strip_scores import add_bias, leave_out
from deepseek.kernels.numba.subroutine import subroutine
from deepseek.kernels.numba.transpose import transpose

Space = namedtuple(
    "Space",
    [
        "width",  # W: width of a vector in whole blocks
        "columns",  # N: columns of the matrices of a strip
        "most",  # L: maximum number of keys of a list, with BLOCK to spare
        "tiled",  # whether the threads have AMX configured
        # Addresses of matrices, bf16 unless noted:
        "queries",  # [BLOCK, W]: a strip's queries
        "grads",  # [BLOCK, W]: gradients of their outputs
        "weights",  # [BLOCK, N]
        "narrow",  # [BLOCK, N]: gradients of the scores
        "paired",  # [BLOCK / 2, N]: a matrix of N columns in pairs
        "transposed",  # [N, BLOCK / 2]: its transpose
        "paired_rows",  # [BLOCK / 2, W]: a matrix of W columns in pairs
        "part",  # fp32 [BLOCK, W]: a strip's outputs, or gradients of its queries
        "key_words",  # [W / 2, L]: the keys of a list, transposed, in pairs
        "value_words",
        "key_pairs",  # [L / 2, W]: the keys of a list in pairs
        "value_pairs",
        "totals",  # fp32 [R, W]: outputs of a unit's queries so far; zero between units
        "scores",  # fp32 [BLOCK, N]
        "changes",  # fp32 [BLOCK, N]: gradients of the weights, then of the scores
        # Arrays:
        "score_array",
        "change_array",
        "memory",  # of everything above
    ],
)


@subroutine
def work_space(longest, most, unit_rows, width, tiled):  # type: ignore[no-untyped-def]
    """Allocate the work space of a thread.

    Args:
        longest: length of the longest window.
        most: maximum number of keys of a list, with `BLOCK` to spare.
        unit_rows: maximum number of queries of a unit.
        width: width of a vector.
        tiled: whether to use AMX.
    """
    wide = whole_blocks(width)
    most = whole_blocks(most)
    columns = whole_blocks(2 * longest) + 2 * BLOCK
    # Bytes of the matrices between `queries` and `totals`.
    sizes = np.array(
        [
            *(2 * BLOCK * wide, 2 * BLOCK * wide),
            *(2 * BLOCK * columns, 2 * BLOCK * columns),
            *(2 * BLOCK * columns, 2 * BLOCK * columns),
            *(2 * BLOCK * wide, 4 * BLOCK * wide),
            *(2 * most * wide, 2 * most * wide, 2 * most * wide, 2 * most * wide),
            4 * unit_rows * wide,
        ]
    )
    memory = np.zeros(sizes.sum() + 64, np.uint8)
    at = (memory.ctypes.data + 63) // 64 * 64 + np.cumsum(sizes) - sizes
    scores = np.zeros((BLOCK, columns), np.float32)
    changes = np.zeros((BLOCK, columns), np.float32)
    return Space(
        wide,
        columns,
        most,
        tiled,
        *(at[0], at[1], at[2], at[3], at[4], at[5], at[6]),
        *(at[7], at[8], at[9], at[10], at[11], at[12]),
        scores.ctypes.data,
        changes.ctypes.data,
        scores,
        changes,
        memory,
    )


@subroutine
def load_vectors(x, places, keys):  # type: ignore[no-untyped-def]
    """Copy the rows `places` of x to the first columns of `keys`."""
    source = x.ctypes.data
    target = keys.ctypes.data
    for j in range(len(places)):
        copy(source + places[j] * x.strides[0], target + j * keys.strides[0], x.shape[1])


@subroutine
def lay_pairs(x, length, space, pairs):  # type: ignore[no-untyped-def]
    """Store the first `length` rows of x, and a block of zeros behind them, in pairs."""
    x[length : length + BLOCK] = 0
    pair(x.ctypes.data, 2 * space.width, pairs, 4 * space.width, length + BLOCK, space.width)


@subroutine
def lay_words(x, length, space, words):  # type: ignore[no-untyped-def]
    """Store the transpose of the first `length` rows of x in pairs."""
    transpose(x.ctypes.data, 2 * space.width, words, 4 * space.most, length, space.width // 2)


@subroutine
def strip_range(first, starts, stops, most):  # type: ignore[no-untyped-def]
    """Return the end of the strip that starts at interval `first`, up to `BLOCK` intervals over at
    most `most` keys, and its first key, which is even because keys are stored in pairs.
    """
    base = starts[first] // 2 * 2
    last = first + 1
    while last < min(first + BLOCK, len(starts)) and stops[last] - base <= most:
        last += 1
    return last, base


@subroutine
def gather(x, rows, space, side):  # type: ignore[no-untyped-def]
    """Set the first rows of `side` to the given rows of x `[T, H/G, K]`, numbered over T and H/G,
    and the others to zero.
    """
    start = x.ctypes.data
    for m in range(BLOCK):
        target = side + 2 * space.width * m
        if m < len(rows):
            t = rows[m] // x.shape[1]
            h = rows[m] % x.shape[1]
            copy(start + t * x.strides[0] + h * x.strides[1], target, x.shape[2])
        else:
            clear(target, space.width)


@subroutine
def with_words(side, words, base, count, columns, space, scores):  # type: ignore[no-untyped-def]
    """Set the first `count` rows of `scores` to the products of those of `side` and the keys or
    values from `base` on.
    """
    multiply(
        side,
        2 * space.width,
        words + 4 * base,
        4 * space.most,
        scores,
        4 * space.columns,
        (count, columns, space.width),
        0,
        space.tiled,
    )


@subroutine
def with_pairs(weights, pairs, base, count, columns, space):  # type: ignore[no-untyped-def]
    """Set the first `count` rows of `space.part` to the products of those of `weights` and the keys
    or values from `base` on.
    """
    multiply(
        weights,
        2 * space.columns,
        pairs + 2 * space.width * base,
        4 * space.width,
        space.part,
        4 * space.width,
        (count, space.width, columns),
        0,
        space.tiled,
    )


@subroutine
def score(queries, laid, strip, earlier, base, columns, scale, space):  # type: ignore[no-untyped-def]
    """Set `space.scores[m, j]` to the score of key `base + j` for query m of the strip, which is
    valid within the query's interval only.

    Keys that one of the first `earlier` intervals has found get `LOWEST`.
    """
    rows, starts, stops = strip
    gather(queries[0], rows, space, space.queries)
    with_words(space.queries, space.key_words, base, len(rows), columns, space, space.scores)
    for m in range(len(rows)):
        place = space.scores + 4 * (m * space.columns + starts[m] - base)
        scale_row(place, stops[m] - starts[m], scale)
    if queries[2].shape[2] > 0:
        add_bias(queries, laid, strip, space.score_array[:, starts[0] - base :].T)
    if earlier > 0:
        leave_out(queries, laid, strip, earlier, space.score_array[:, starts[0] - base :].T)
