"""Attention over intervals on a CPU: 16 queries at a time in fp32, in the lanes of its vectors, and
32 in bf16, as two tiles of AMX.

A unit of work is a chunk of `CHUNK` queries of one key/value head, for all heads that share it. Its
intervals are sorted by list, and the keys of a list are copied to contiguous memory once. 16 or 32
neighbouring intervals form a strip, which scans their largely common keys (`strip_forward.py`,
`strip_backward.py`, `bf16_forward.py`, `bf16_backward.py`). Each query belongs to one unit, so
results need no locks. Gradients of keys come from many units, so each thread accumulates its own,
over its range of chunks.
"""

from functools import cache
from math import gcd

import numpy as np
import torch
from torch import Tensor

from deepseek.kernels.lsh import (
    bf16_backward,
    bf16_forward,
    strip_backward,
    strip_buffers,
    strip_forward,
)
from deepseek.kernels.lsh.bf16_product import BLOCK, multiplies_fast
from deepseek.kernels.lsh.bf16_scores import load_vectors
from deepseek.kernels.lsh.intervals import Intervals, Windows
from deepseek.kernels.lsh.product import ROWS
from deepseek.kernels.lsh.strip_scores import LOWEST
from deepseek.kernels.lsh.tiles import Inputs
from deepseek.kernels.numba import amx
from deepseek.kernels.numba.by_dtype import by_dtype
from deepseek.kernels.numba.launch import compiled, launch, unpack
from deepseek.kernels.numba.primitives import share
from deepseek.kernels.numba.subroutine import subroutine

CHUNK = 512
# Maximum number of copies of the gradients of keys and values; each takes as much memory as those.
MOST_LANES = 4


@subroutine
def _sorted(codes, start, stop, rounds, num_lists):  # type: ignore[no-untyped-def]
    """Return query, start and stop of all non-empty intervals, sorted by list, and the end of each
    list.

    The first list is the local one; the others are the buckets, with the sinks last in their round.
    """
    heads, length, count = start.shape
    # Intervals and buckets of a round, including those of the sinks.
    looks, buckets = ((count - 1) // rounds, (num_lists - 1) // rounds)
    rows = np.empty(start.size, np.int32)
    starts = np.empty(start.size, np.int32)
    stops = np.empty(start.size, np.int32)
    ends = np.zeros(num_lists + 1, np.int64)
    for filling in (False, True):
        for t in range(length):
            for r in range(heads):
                for i in range(count):
                    if stop[r, t, i] > start[r, t, i]:
                        c = 0
                        if i > 0:
                            number, look = divmod(i - 1, looks)
                            code = codes[r, t, i - number - 2] if look > 0 else buckets - 1
                            c = 1 + number * buckets + code
                        if filling:
                            place = ends[c]
                            rows[place] = t * heads + r
                            starts[place] = start[r, t, i]
                            stops[place] = stop[r, t, i]
                        ends[c if filling else c + 1] += 1
        if not filling:
            for c in range(num_lists):
                ends[c + 1] += ends[c]
    return rows, starts, stops, ends


@subroutine
def _load(x, places, keys):  # type: ignore[no-untyped-def]
    """Copy the rows `places` of x to `keys`."""
    for j in range(len(places)):
        keys[j] = x[places[j]]


@subroutine
def _store(keys, places, x):  # type: ignore[no-untyped-def]
    """Add the first columns of `keys` to the rows `places` of x."""
    width = x.shape[1]
    for j in range(len(places)):
        row = x[places[j]]
        for k in range(width):
            row[k] += keys[j, k]


_backward = by_dtype(strip_backward.backward, bf16_backward.backward)
_forward = by_dtype(strip_forward.forward, bf16_forward.forward)
_load_vectors = by_dtype(_load, load_vectors)
_divide = by_dtype(strip_forward.divide, bf16_forward.divide)


@subroutine
def _unit(queries, codes, sources, results, grads, buffers, num_lists, scale, backwards):  # type: ignore[no-untyped-def]
    """Process all lists of one unit, forward or backward."""
    (key, value, rank, term, place, order), (out, lse) = sources, results
    laid, values, grads_laid, small = buffers
    (keys, ranks, terms, places), (grad_keys, grad_values, grad_terms) = laid, grads_laid
    grads_out, grads_in, (grad_key, grad_value, grad_term) = grads
    _, _, tables, _, starts_in, stops_in = queries
    rounds = len(place) + 1
    a_round = (starts_in.shape[2] - 1) // (len(place) + 1)
    rows, starts, stops, ends = _sorted(codes, starts_in, stops_in, rounds, num_lists)
    highest = np.full(lse.size, LOWEST, np.float32)
    sums = np.zeros(lse.size, np.float32)
    first = 0
    for c in range(num_lists):
        if ends[c] == first:
            continue
        list_slice = slice(first, ends[c])
        base = starts[first]
        pairs = rows[list_slice], starts[list_slice] - base, stops[list_slice] - base
        key_ids = order[base : stops[ends[c] - 1]]
        first = ends[c]
        _load_vectors(key, key_ids, keys)
        _load_vectors(value, key_ids, values)
        if tables.shape[2] > 0:
            _load(rank, key_ids, ranks)
            _load(term, key_ids, terms)
        earlier = max(c - 1, 0) * rounds // (num_lists - 1)  # number of rounds before this list's
        for r in range(earlier):
            _load(place[r], key_ids, places[r])
        if backwards:
            for part in grads_laid:
                part[: len(key_ids) + ROWS] = 0
            _backward(
                values,
                queries,
                laid,
                out,
                lse,
                pairs,
                earlier * a_round,
                scale,
                small,
                grads_out,
                grads_in,
                grads_laid,
            )
            _store(grad_keys, key_ids, grad_key)
            _store(grad_values, key_ids, grad_value)
            if tables.shape[2] > 0:
                _store(grad_terms, key_ids, grad_term)
        else:
            _forward(
                values, queries, laid, out, pairs, earlier * a_round, scale, small, highest, sums
            )
    if not backwards:
        _divide(out, lse, highest, sums, small)


@subroutine
def _run(  # type: ignore[no-untyped-def]
    q,
    key,
    value,
    table,
    term,
    out,
    lse,
    order,
    start,
    stop,
    codes,
    place,
    rank,
    grad,
    grad_lse,
    grad_q,
    grad_table,
    grad_key,
    grad_value,
    grad_term,
    early_key,
    early_value,
    early_term,
    scale,
    num_lists,
    longest,
    backwards,
    tiled,
):
    (batch, length, heads, width), groups, past = q.shape, key.shape[2], key.shape[1] - q.shape[1]
    lanes = 1 + len(early_key)
    heads_per_group = heads // groups
    chunks = (length + CHUNK - 1) // CHUNK
    most = CHUNK + longest + 2 * BLOCK
    rounds = place.shape[2] + 1
    unit_rows = CHUNK * heads_per_group
    buffers = strip_buffers.buffers(
        key, most, longest, unit_rows, heads_per_group, width, rounds, tiled
    )
    if tiled:
        amx.configure()
    begin, end = share(batch * groups * lanes)
    for unit in range(begin, end):
        b = unit // (groups * lanes)
        g = unit // lanes % groups
        lane = unit % lanes
        h = slice(g * heads_per_group, (g + 1) * heads_per_group)
        sources = key[b, :, g], value[b, :, g], rank[b], term[b, :, h], place[b, g], order[b, g]
        grads_keys = grad_key[b, :, g], grad_value[b, :, g], grad_term[b, :, h]
        if lane < lanes - 1:
            grads_keys = (
                early_key[lane, b, :, g],
                early_value[lane, b, :, g],
                early_term[lane, b, :, h],
            )
        for chunk in range(lane * chunks // lanes, (lane + 1) * chunks // lanes):
            u = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, length))
            slots = slice(past + u.start, past + u.stop)
            queries = (
                q[b, u, h],
                rank[b, slots],
                table[b, u, h],
                term[b, slots, h],
                start[b, h, u],
                stop[b, h, u],
            )
            grads = (
                (grad[b, u, h], grad_lse[b, u, h]),
                (grad_q[b, u, h], grad_table[b, u, h]),
                grads_keys,
            )
            results = out[b, u, h], lse[b, u, h]
            _unit(
                queries,
                codes[b, h, u],
                sources,
                results,
                grads,
                buffers,
                num_lists,
                scale[0],
                backwards != 0,
            )
    if tiled:
        amx.release()


@cache
def _kernel(kinds: str) -> int:
    return compiled(lambda data: _run(*unpack(data, kinds)))


def _vector_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype in which the kernel reads queries, keys and values: fp32 unless they are in
    bf16 and the processor multiplies that faster.
    """
    half = query.dtype == torch.bfloat16 and multiplies_fast()
    return torch.bfloat16 if half else torch.float32


def _by_token(part_BHT: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor `[B, T, H, ...]`, contiguous and converted to `dtype`."""
    return part_BHT.transpose(1, 2).to(dtype).contiguous()


def _inputs(inputs: Inputs) -> list[Tensor]:
    """Return query, key, value, table and term, ordered by token.

    Without a bias, the table has no columns and there are no terms.
    """
    query, key, value, table, term = inputs
    dtype = _vector_dtype(query)
    arrays = [_by_token(part, dtype) for part in (query, key, value)]
    if table is None or term is None:
        return [
            *arrays,
            query.new_empty(*arrays[0].shape[:3], 0, dtype=torch.float32),
            query.new_empty(len(query), 0, query.shape[1], dtype=torch.float64),
        ]
    return [*arrays, _by_token(table), _by_token(term, torch.float64)]


def _call(
    arrays: list[Tensor],
    intervals: Intervals,
    grads: list[Tensor],
    windows: Windows,
    scale: float,
    backwards: bool,
) -> None:
    """Launch the kernel, forward or backward."""
    places = (intervals.order_BGZ, intervals.start_BHTI, intervals.stop_BHTI, intervals.codes_BHTP)
    parts = (part.contiguous() for part in (*places, intervals.place_BGRS, intervals.rank_BS))
    limits = (
        windows.num_lists,
        min(windows.longest(), arrays[1].shape[1]),
        int(backwards),
        int(amx.available()),
    )
    launch(_kernel, *arrays, *parts, *grads, torch.tensor([scale]), *limits)


def forward(
    inputs: Inputs, intervals: Intervals, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """Do what `tiles.forward` does; the attention is in the dtype of `_vector_dtype`."""
    query, key, value, table, _ = arrays = _inputs(inputs)
    out = torch.zeros_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    # The forward pass does not access the gradients, so any tensor can stand in for them.
    nothing = lse.new_empty(1)
    placeholders = nothing.expand(key.shape), nothing.expand(value.shape), lse[:, :0]
    lanes = [
        part[None].expand(-(-query.shape[1] // CHUNK) - 1, *part.shape) for part in placeholders
    ]
    _call(
        [*arrays, out, lse],
        intervals,
        [query, lse, nothing.expand(query.shape), table, *placeholders, *lanes],
        windows,
        scale,
        False,
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def backward(
    grad_BHTK: Tensor,
    grad_lse_BHT: Tensor,
    inputs: Inputs,
    out_BHTK: Tensor,
    lse_BHT: Tensor,
    intervals: Intervals,
    windows: Windows,
    scale: float,
) -> tuple[Tensor, ...]:
    """Do what `tiles.backward` does, with results in fp32."""
    arrays = _inputs(inputs)
    query, key, value, table, term = arrays
    threads = torch.get_num_threads()
    heads = key.shape[0] * key.shape[2]
    length = query.shape[1]
    chunks = -(-length // CHUNK)
    lanes = min(threads // gcd(threads, heads), MOST_LANES, chunks)  # for equal load
    # Number of keys that the lanes before the last can see.
    early = key.shape[1] - length + (lanes - 1) * chunks // lanes * CHUNK
    key_tensors = key, value, term
    summed = [part.new_zeros(part.shape, dtype=torch.float32) for part in key_tensors]
    earlier = [
        part.new_zeros(lanes - 1, *part[:, :early].shape, dtype=torch.float32)
        for part in key_tensors
    ]
    query_grads = [torch.zeros_like(part, dtype=torch.float32) for part in (query, table)]
    out, grad = (_by_token(part, query.dtype) for part in (out_BHTK, grad_BHTK))
    lse, grad_lse = (_by_token(part) for part in (lse_BHT, grad_lse_BHT))
    _call(
        [*arrays, out, lse],
        intervals,
        [grad, grad_lse, *query_grads, *summed, *earlier],
        windows,
        scale,
        True,
    )
    for part, of_lanes in zip(summed, earlier, strict=True):
        for of_lane in of_lanes:
            part[:, :early] += of_lane
    grads = query_grads[0], *summed[:2], query_grads[1], summed[2]
    return tuple(part.transpose(1, 2) for part in grads)
