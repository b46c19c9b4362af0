"""The scores of one strip: up to 16 queries, as columns of a small matrix, over one range of keys.

`queries` describes the queries of a unit: the vectors `[T, H/G, K]`, their ranks among real tokens,
the tables and terms of their bias (see `score_bias.py`; tables without columns mean no bias), and
the starts and stops of their intervals. `laid` describes the keys of a list: the vectors, their
ranks and terms, and their places in the parts of earlier rounds.
"""

import numpy as np

from deepseek.kernels.bias.distance import STARTS
from deepseek.kernels.lsh.product import COLUMNS, multiply
from deepseek.kernels.numba.subroutine import subroutine

LOWEST = np.float32(-1e30)
# Fast-math without reassociation: sums keep the order of the code.
EXACT = {"contract", "nnan", "ninf", "nsz", "arcp"}
# Bucket of each distance, up to the start of the last bucket.
_BUCKETS = (np.searchsorted(STARTS, np.arange(STARTS[-1] + 1), side="right") - 1).astype(np.uint8)


@subroutine(inline="always")
def bucket(distance):  # type: ignore[no-untyped-def]
    """Return the bucket of a distance (see `distance.py`)."""
    return _BUCKETS[min(distance, len(_BUCKETS) - 1)]


@subroutine
def strip_end(first, starts, stops, most):  # type: ignore[no-untyped-def]
    """Return the end of the strip that starts at interval `first`: up to 16 intervals over at most
    `most` keys.
    """
    last = first + 1
    while last < min(first + COLUMNS, len(starts)) and stops[last] - starts[first] <= most:
        last += 1
    return last


@subroutine
def gather(x, rows, scale, side):  # type: ignore[no-untyped-def]
    """Set the columns of `side` to `scale` times the given rows of x `[T, H/G, K]`, numbered over T
    and H/G.
    """
    for m in range(len(rows)):
        row = x[rows[m] // x.shape[1], rows[m] % x.shape[1]]
        for k in range(len(row)):
            side[k, m] = scale * row[k]


@subroutine
def score(queries, laid, pairs, earlier, side, scores):  # type: ignore[no-untyped-def]
    """Set `scores[j, m]` to the score of the strip's key j for query m, or `LOWEST` outside the
    query's interval.

    The columns of `side` are the queries. The first `earlier` intervals after the local one belong
    to earlier rounds; keys that those have found get `LOWEST` as well.
    """
    (_, starts, stops), key = pairs, laid[0]
    base = starts[0]
    count = stops[-1] - starts[0]
    width = key.shape[1]
    multiply(
        key[base:].ctypes.data,
        width,
        1,
        side.ctypes.data,
        COLUMNS,
        scores.ctypes.data,
        COLUMNS,
        count,
        COLUMNS,
        width,
    )
    for m in range(COLUMNS):
        first, last = (starts[m] - base, stops[m] - base) if m < len(starts) else (count, count)
        for j in range(first):
            scores[j, m] = LOWEST
        for j in range(last, count):
            scores[j, m] = LOWEST
    if queries[2].shape[2] > 0:
        add_bias(queries, laid, pairs, scores)
    if earlier > 0:
        leave_out(queries, laid, pairs, earlier, scores)


@subroutine
def add_bias(queries, laid, pairs, scores):  # type: ignore[no-untyped-def]
    """Add the bias to the scores."""
    (_, ranks, tables, terms, _, _), (_, key_ranks, key_terms, _), (rows, starts, stops) = (
        queries,
        laid,
        pairs,
    )
    for m in range(len(rows)):
        t = rows[m] // tables.shape[1]
        h = rows[m] % tables.shape[1]
        rank = ranks[t]
        table = tables[t, h]
        term = terms[t, h]
        for j in range(starts[m], stops[m]):
            # The difference is taken in fp64, because terms are sums over a whole text.
            scores[j - starts[0], m] += table[bucket(rank - key_ranks[j])] + np.float32(
                key_terms[j, h] - term
            )


@subroutine
def leave_out(queries, laid, pairs, earlier, scores):  # type: ignore[no-untyped-def]
    """Set the score of keys whose places lie in an interval of an earlier round to `LOWEST`."""
    (_, _, _, _, firsts, lasts), (_, _, _, places), (rows, starts, stops) = queries, laid, pairs
    a_round = (firsts.shape[2] - 1) // (len(places) + 1)
    for m in range(len(rows)):
        t = rows[m] // len(firsts)
        h = rows[m] % len(firsts)
        for i in range(earlier):
            first = firsts[h, t, i + 1]
            last = lasts[h, t, i + 1]
            places_of_round = places[i // a_round]
            for j in range(starts[m], stops[m]):
                if first <= places_of_round[j] < last:
                    scores[j - starts[0], m] = LOWEST
