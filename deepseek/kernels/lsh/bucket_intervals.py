"""Find the intervals of probed buckets by one scan over the keys, without a search per interval.

While the scan passes over the queries, it counts the keys of each bucket that have left the local
window, and those before the query's document.
"""

from functools import cache

import numpy as np
from torch import Tensor

from deepseek.kernels.numba.launch import compiled, launch, unpack
from deepseek.kernels.numba.primitives import share
from deepseek.kernels.numba.subroutine import subroutine


@subroutine
def _scan(marked, codes, documents, start, stop, sizes, base):  # type: ignore[no-untyped-def]
    """Set the intervals of all queries of one key/value head in one round.

    `codes` and the intervals are those of its heads. The first interval is that of the sinks.
    `base` is the first place of the round's part.
    """
    num_buckets, local, sinks, window = sizes
    heads, length, looks = start.shape
    past = len(marked) - length
    edges = np.zeros(num_buckets + 3, np.int64)  # with sinks and padding
    for code in marked:
        edges[code + 1] += 1
    for c in range(num_buckets + 2):
        edges[c + 1] += edges[c]
    # Places after the last key that has left the window, and after the last of earlier documents.
    ends = base + edges
    floors = base + edges
    gone = 0
    before = 0
    for t in range(length):
        while gone < past + t - local + 1:
            ends[marked[gone]] += 1
            gone += 1
        while before < documents[past + t]:
            floors[marked[before]] += 1
            before += 1
        for h in range(heads):
            for i in range(looks):
                code = codes[h, t, i - 1] if i > 0 else num_buckets
                limit = window if i > 0 else sinks
                end = max(ends[code], floors[code])
                stop[h, t, i] = end
                start[h, t, i] = max(end - limit, floors[code])


@subroutine
def _run(marked, codes, documents, start, stop, rounds, num_buckets, local, sinks, window):  # type: ignore[no-untyped-def]
    (batch, rows, total), heads = marked.shape, start.shape[1]
    probes = codes.shape[3] // rounds
    group = heads * rounds // rows
    begin, end = share(batch * rows)
    for unit in range(begin, end):
        b = unit // rows
        g = unit % rows // rounds
        r = unit % rounds
        h = slice(g * group, (g + 1) * group)
        looks = slice(1 + r * (1 + probes), 1 + (r + 1) * (1 + probes))
        _scan(
            marked[b, unit % rows],
            codes[b, h, :, r * probes : (r + 1) * probes],
            documents[b],
            start[b, h, :, looks],
            stop[b, h, :, looks],
            (num_buckets, local, sinks, window),
            (1 + r) * total,
        )


@cache
def _kernel(kinds: str) -> int:
    return compiled(lambda data: _run(*unpack(data, kinds)))


def scan(
    query_codes_BHTP: Tensor,
    marked_BJS: Tensor,
    first_BS: Tensor | None,
    sizes: tuple[int, ...],
    bounds: tuple[Tensor, Tensor],
) -> None:
    """Set all intervals but the local ones.

    Args:
        query_codes_BHTP, marked_BJS, first_BS: see `intervals.find_intervals`; on a CPU.
        sizes: rounds, buckets of a round, keys in the local window, sinks, keys of each bucket.
        bounds: `start_BHTI` and `stop_BHTI` of `intervals.Intervals`, contiguous.
    """
    batch, _, total = marked_BJS.shape
    documents = marked_BJS.new_zeros(1) if first_BS is None else first_BS
    launch(
        _kernel,
        marked_BJS.int().contiguous(),
        query_codes_BHTP.int().contiguous(),
        documents.long().expand(batch, total).contiguous(),
        *bounds,
        *sizes,
    )
