"""Attention of the newest token of many sequences, each over its own keys, in one call.

The kernel also appends the new key and value to their sequence's memory. A query attends to a range
of positions that ends with its own, and with LSH attention to the candidates of its buckets (see
`lsh/decode.py`). Pairs of sequence and key head are divided among the threads. Keys and values are
fp32 or bf16; sums are fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from deepseek.kernels.bias.distance import NUM_BUCKETS, STARTS
from deepseek.kernels.numba.launch import compiled, launch, unpack
from deepseek.kernels.numba.primitives import exp, pointer, thread_count, thread_number, widen
from deepseek.kernels.numba.subroutine import subroutine

# Bucket of each distance, up to the start of the last bucket.
_BUCKET = np.searchsorted(np.array(STARTS[1:]), np.arange(STARTS[-1] + 1), side="right")

_DOUBLE = np.empty(0, np.float64)

# Columns of the table of sequences.
KEYS, VALUES, CAPACITY, TOTAL, FIRST, KEY_BIAS, BIAS_STRIDE, RING, COUNT, CODES, ROOM = range(11)


@dataclass(frozen=True)
class Memory:
    """Keys and values of one sequence at one layer; the kernel writes those of the newest token.

    Attributes:
        keys, values: contiguous `[1, G, capacity, K]`.
        total: number of tokens, the newest one included.
        first: first position that the newest token attends to, apart from bucket candidates.
        key_bias: term of each key `[1, H, S]`, fp64; None: none.
        buckets: addresses of the rings, their counts and the codes, and the capacity of the codes,
            for LSH attention; None: attention to the range alone.
    """

    keys: Tensor
    values: Tensor
    total: int
    first: int
    key_bias: Tensor | None = None
    buckets: tuple[int, int, int, int] | None = None

    def row(self) -> list[int]:
        """Return the sequence's row of the table that the kernel reads."""
        bias = (
            (0, 0) if self.key_bias is None else (self.key_bias.data_ptr(), self.key_bias.stride(1))
        )
        return [
            self.keys.data_ptr(),
            self.values.data_ptr(),
            self.keys.shape[2],
            self.total,
            self.first,
            *bias,
            *(self.buckets or (0, 0, 0, 0)),
        ]


@dataclass(frozen=True)
class Probes:
    """The buckets of the newest tokens in LSH attention with one round.

    Attributes:
        query_codes_RHP: buckets that each query probes.
        key_codes_RG: bucket of each new key.
        num_buckets, bucket, local, sinks: see `lsh.intervals.Windows`.
    """

    query_codes_RHP: Tensor
    key_codes_RG: Tensor
    num_buckets: int
    bucket: int
    local: int
    sinks: int


@subroutine(fastmath=True, inline="always")
def _dot(row, x):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for k in range(len(row)):
        total += widen(row[k]) * x[k]
    return total


@subroutine(fastmath=True)
def _score(query, keys, scores):  # type: ignore[no-untyped-def]
    """Set the scores of consecutive keys."""
    for s in range(len(scores)):
        scores[s] = _dot(keys[s], query)


@subroutine(fastmath=True)
def _add_bias(scores, table, terms, last):  # type: ignore[no-untyped-def]
    """Add the bias to the scores of consecutive keys, the last of which is the newest."""
    for s in range(len(scores)):
        if len(table):
            scores[s] += table[_BUCKET[min(len(scores) - 1 - s, len(_BUCKET) - 1)]]
        if len(terms):
            scores[s] += np.float32(terms[s] - last)


@subroutine(fastmath=True)
def _softmax(scores):  # type: ignore[no-untyped-def]
    """Replace scores by weights; return the reciprocal of their sum."""
    largest = scores[0]
    for s in range(1, len(scores)):
        largest = max(largest, scores[s])
    total = np.float32(0)
    for s in range(len(scores)):
        scores[s] = exp(scores[s] - largest)
        total += scores[s]
    return np.float32(1) / total


@subroutine(fastmath=True, inline="always")
def _add(out, weight, row):  # type: ignore[no-untyped-def]
    for k in range(len(out)):
        out[k] += weight * widen(row[k])


@subroutine(error_model="numpy")
def _enter(codes, ring, count, total, code, sinks, local, num_buckets):  # type: ignore[no-untyped-def]
    """Store the code of the newest key, and move the key that leaves the local window into its
    bucket's ring.
    """
    codes[total - 1] = num_buckets if total - 1 < sinks else code
    position = total - 1 - local
    if position >= 0:
        bucket = codes[position]
        ring[bucket, count[bucket] % ring.shape[1]] = position
        count[bucket] += 1


@subroutine(error_model="numpy")
def _candidates(ring, count, probed, sinks, window, num_buckets, positions):  # type: ignore[no-untyped-def]
    """Set the positions of a query's candidates, sinks first; return their number."""
    found = 0
    for p in range(len(probed) + 1):
        bucket = num_buckets if p == 0 else probed[p - 1]
        limit = sinks if p == 0 else window
        for age in range(min(count[bucket], limit)):
            positions[found] = ring[bucket, (count[bucket] - 1 - age) % ring.shape[1]]
            found += 1
    return found


@subroutine(error_model="numpy")
def _at(memory, column, index, shape, like):  # type: ignore[no-untyped-def]
    """Return the `index`-th of the adjacent arrays of a shape at a sequence's address."""
    offset = index * shape[0] * shape[1] * like.itemsize
    return carray(pointer(memory[column] + offset), shape, like.dtype)


@subroutine(error_model="numpy")
def _head(query, keys, values, table, terms, first, positions, scores, out):  # type: ignore[no-untyped-def]
    """Compute the attention of one query over the keys from `first` on and over those at
    `positions`.
    """
    total = len(keys)
    near = total - first
    last = terms[total - 1] if len(terms) else 0.0
    _score(query, keys[first:], scores[:near])
    _add_bias(scores[:near], table, terms[first:], last)
    for n in range(len(positions)):
        at = positions[n]
        score = _dot(keys[at], query)
        if len(table):
            score += table[_BUCKET[min(total - 1 - at, len(_BUCKET) - 1)]]
        if len(terms):
            score += np.float32(terms[at] - last)
        scores[near + n] = score
    factor = _softmax(scores[: near + len(positions)])
    out[:] = 0
    for s in range(near):
        _add(out, scores[s] * factor, values[first + s])
    for n in range(len(positions)):
        _add(out, scores[near + n] * factor, values[positions[n]])


@subroutine(error_model="numpy")
def _run(queries, new_keys, new_values, table, sequences, probed, new_codes, sizes, out):  # type: ignore[no-untyped-def]
    heads, width = queries.shape[1:]
    groups = new_keys.shape[1]
    shared = heads // groups
    num_buckets, window, local, sinks = sizes[0], sizes[1], sizes[2], sizes[3]
    places = max(window, sinks)
    positions = np.empty(sinks + probed.shape[2] * window, np.int64)
    scores = np.empty(sequences[:, TOTAL].max() + len(positions), np.float32)
    codes = np.empty(0, np.int32)
    for unit in range(thread_number(), len(queries) * groups, thread_count()):
        r = unit // groups
        g = unit % groups
        memory = sequences[r]
        total = memory[TOTAL]
        extent = (memory[CAPACITY], width)
        keys = _at(memory, KEYS, g, extent, new_keys)[:total]
        values = _at(memory, VALUES, g, extent, new_keys)[:total]
        keys[total - 1] = new_keys[r, g]
        values[total - 1] = new_values[r, g]
        buckets = num_buckets + 2 if memory[RING] != 0 else 0
        ring = _at(memory, RING, g, (buckets, places), positions)
        count = _at(memory, COUNT, g, (1, buckets), positions)[0]
        if buckets:
            row = _at(memory, CODES, g, (1, memory[ROOM]), codes)[0]
            _enter(row, ring, count, total, new_codes[r, g], sinks, local, num_buckets)
        for h in range(g * shared, (g + 1) * shared):
            stride = memory[BIAS_STRIDE]
            terms = _at(memory, KEY_BIAS, h, (1, stride), _DOUBLE)[0][: min(stride, total)]
            found = 0
            if buckets:
                found = _candidates(
                    ring, count, probed[r, h], sinks, window, num_buckets, positions
                )
            _head(
                queries[r, h],
                keys,
                values,
                table[r, h],
                terms,
                memory[FIRST],
                positions[:found],
                scores,
                out[r, h],
            )


@cache
def _kernel(kinds: str) -> int:
    return compiled(lambda data: _run(*unpack(data, kinds)))


def attend(
    query_RHK: Tensor,
    key_RGK: Tensor,
    value_RGK: Tensor,
    table_RHN: Tensor | None,
    memories: Sequence[Memory],
    probes: Probes | None = None,
) -> Tensor:
    """Append one key and value to each sequence and return the attention of its query, fp32
    `[R, H, K]`.

    Args:
        query_RHK: the queries, scaled.
        key_RGK, value_RGK: the new keys and values, in the dtype of the memories: fp32 or bf16.
        table_RHN: bias of each query and bucket of distance (see `bias/distance.py`); None: none.
        memories: keys and values of each sequence.
        probes: buckets of LSH attention; None: attention to the ranges alone.
    """
    rows, heads, _ = query_RHK.shape
    sequences = torch.tensor([memory.row() for memory in memories])
    if table_RHN is None:
        table_RHN = query_RHK.new_empty(rows, heads, 0, dtype=torch.float32)
    assert table_RHN.shape[2] in (0, NUM_BUCKETS)
    if probes is None:
        probed = torch.empty(rows, heads, 0, dtype=torch.int64)
        codes = torch.empty(rows, 0, dtype=torch.int64)
        sizes = torch.zeros(4, dtype=torch.int64)
    else:
        probed = probes.query_codes_RHP.contiguous()
        codes = probes.key_codes_RG.contiguous()
        sizes = torch.tensor([probes.num_buckets, probes.bucket, probes.local, probes.sinks])
    out_RHK = torch.empty(query_RHK.shape, dtype=torch.float32)
    launch(
        _kernel,
        query_RHK.float().contiguous(),
        key_RGK.contiguous(),
        value_RGK.contiguous(),
        table_RHN.float().contiguous(),
        sequences,
        probed,
        codes,
        sizes,
        out_RHK,
    )
    return out_RHK
