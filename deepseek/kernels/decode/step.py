"""One forward pass of a dense transformer over a ragged batch, on all threads of torch's pool, in one call.

The weights are read once, whatever the number of rows. Between two stages, of which each needs all of the one before,
threads meet at a barrier; within a stage they share panels of weights, rows or units of attention.
"""

from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
from numba import carray, cfunc, njit, types

from deepseek.kernels import few_tokens, int8, openmp
from deepseek.kernels.decode.attention import attend, place_heads
from deepseek.kernels.decode.experts import activate_experts, add_experts, score_row, weigh
from deepseek.kernels.decode.rows import activate, add_projected, barrier, embed, floats, norm_row, project, round_group
from deepseek.kernels.decode.state import Batch, Sites, Weights, Work
from deepseek.kernels.few_tokens import pointer, share, thread_number
from deepseek.kernels.int8 import COLUMNS, GROUP

HEADER = 11  # numbers at the beginning of a plan


@njit(error_model="numpy")
def _blocks(count, size):  # type: ignore[no-untyped-def]
    return (count + size - 1) // size


@njit(error_model="numpy")
def _panels(outputs):  # type: ignore[no-untyped-def]
    """Return the panels, first and past the last, of a matrix with so many outputs that this thread computes."""
    return share(_blocks(outputs, COLUMNS))


@njit(error_model="numpy")
def _prepare(weights, batch, sites, work, place, layer):  # type: ignore[no-untyped-def]
    """Norm and round this thread's rows; where `layer` has experts, score the rows for them."""
    hidden = weights.sizes[1]
    groups = _blocks(hidden, GROUP)
    normed = np.zeros(groups * GROUP, np.float32)
    first, last = share(len(batch.ids))
    for r in range(first, last):
        norm_row(work.stream[r], weights.norms[place], weights.eps[0], normed)
        for g in range(groups):
            round_group(normed[g * GROUP :].ctypes.data, work.tables[0, r], g, groups)
        if layer >= 0 and sites.first[layer + 1] > sites.first[layer]:
            score_row(sites, work, layer, batch.chunk[r], r, normed)


@njit(error_model="numpy")
def _attention(weights, batch, sites, work, layer, counter, places, ones):  # type: ignore[no-untyped-def]
    """Add the attention of a layer to the stream."""
    hidden, heads, groups, width = weights.sizes[1], weights.sizes[2], weights.sizes[3], weights.sizes[4]
    _prepare(weights, batch, sites, work, 2 * layer, -1)
    barrier(counter)
    first, last = _panels((heads + 2 * groups) * width)
    rows = len(batch.ids)
    project(weights.qkv[layer], first, last, work.tables[0].ctypes.data, rows, _blocks(hidden, GROUP), work.projected)
    barrier(counter)
    place_heads(weights, batch, work, layer)
    barrier(counter)
    attend(weights, batch, work, layer)
    barrier(counter)
    first, last = _panels(hidden)
    add_projected(
        weights.out[layer], first, last, work.tables[1].ctypes.data, places, ones, heads * width // GROUP,
        weights.out_bias[layer], work.stream,
    )  # fmt: skip
    barrier(counter)


@njit(error_model="numpy")
def _feed_forward(weights, batch, sites, work, layer, counter, places, ones, zeros):  # type: ignore[no-untyped-def]
    """Add the feed-forward network of a layer, and the experts beside it, to the stream."""
    hidden, inner, rows = weights.sizes[1], weights.sizes[5], len(batch.ids)
    _prepare(weights, batch, sites, work, 2 * layer + 1, layer)
    barrier(counter)
    if sites.first[layer + 1] > sites.first[layer]:
        weigh(sites, batch, work, layer)
        barrier(counter)
    first, last = share(inner)
    table, groups = work.tables[0].ctypes.data, _blocks(hidden, GROUP)
    activate(weights.gate_up[layer], first, last, table, rows, groups, inner, work.tables[2, 0])
    activate_experts(weights, sites, work, layer, thread_number())
    barrier(counter)
    first, last = _panels(hidden)
    add_projected(weights.down[layer], first, last, work.tables[2].ctypes.data, places, ones, inner, zeros, work.stream)
    add_experts(sites, work, layer, thread_number(), first, last, zeros)
    barrier(counter)


@njit(error_model="numpy")
def _run(weights, batch, sites, work):  # type: ignore[no-untyped-def]
    layers, hidden, vocabulary = weights.sizes[0], weights.sizes[1], weights.sizes[6]
    rows, groups, counter = len(batch.ids), _blocks(hidden, GROUP), work.sync.ctypes.data
    places, ones, zeros = np.arange(rows), np.ones(rows, np.float32), np.zeros(hidden, np.float32)
    first, last = share(rows)
    for r in range(first, last):
        embed(weights.embedding[0], batch.ids[r], groups, work.stream[r])
    for layer in range(layers):
        _attention(weights, batch, sites, work, layer, counter, places, ones)
        _feed_forward(weights, batch, sites, work, layer, counter, places, ones, zeros)
    normed = np.zeros(groups * GROUP, np.float32)
    first, last = share(len(batch.kept))
    for i in range(first, last):
        norm_row(work.stream[batch.kept[i]], weights.norms[2 * layers], weights.eps[0], normed)
        for g in range(groups):
            round_group(normed[g * GROUP :].ctypes.data, work.tables[0, i], g, groups)
    barrier(counter)
    first, last = _panels(vocabulary)
    project(weights.head[0], first, last, work.tables[0].ctypes.data, len(batch.kept), groups, work.logits)


@njit(error_model="numpy")
def _whole(address, *shape):  # type: ignore[no-untyped-def]
    return carray(pointer(address), shape, np.int64)


@njit(error_model="numpy")
def _weights(a, positions):  # type: ignore[no-untyped-def]
    sizes = _whole(a[0], 8)
    layers, hidden, heads, groups, width = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    projected = (heads + 2 * groups) * width
    return Weights(
        sizes, _whole(a[1], layers), _whole(a[2], layers), _whole(a[3], layers), _whole(a[4], layers),
        _whole(a[5], 1), _whole(a[6], 1), floats(a[7], 2 * layers + 1, hidden),
        floats(a[8], layers, 2, sizes[7]), floats(a[9], layers, projected), floats(a[10], layers, hidden),
        _whole(a[11], layers), floats(a[12], positions, width // 2), floats(a[13], positions, width // 2),
        floats(a[14], 1),
    )  # fmt: skip


@njit(error_model="numpy")
def _batch(plan):  # type: ignore[no-untyped-def]
    rows, chunks, pages, kept = plan[0], plan[1], plan[2], plan[3]
    at = HEADER
    ids, positions, chunk = plan[at : at + rows], plan[at + rows : at + 2 * rows], plan[at + 2 * rows : at + 3 * rows]
    at += 3 * rows
    first, units = plan[at : at + chunks + 1], plan[at + chunks + 1 : at + 2 * chunks + 2]
    at += 2 * chunks + 2
    table = plan[at : at + chunks * pages].reshape(chunks, pages)
    at += chunks * pages
    return Batch(ids, positions, chunk, first, table, units, plan[4:5], plan[at : at + kept]), at + kept


@njit(error_model="numpy")
def _sites(a, plan, at, layers, hidden):  # type: ignore[no-untyped-def]
    chunks, sites, members = plan[1], plan[5], plan[6]
    ends = at + chunks + 1
    return Sites(
        _whole(a[17], layers + 1), _whole(a[18], sites), _whole(a[19], sites), _whole(a[20], sites),
        floats(a[21], sites, 2, hidden + 1), floats(a[22], sites), plan[at:ends], plan[ends : ends + members],
        plan[ends + members : ends + members + chunks], plan[ends + members + chunks : ends + members + 2 * chunks],
    )  # fmt: skip


@njit(error_model="numpy")
def _work(a, plan, sizes):  # type: ignore[no-untyped-def]
    rows, kept, sites, threads, span, room, layer_sites = plan[0], plan[3], plan[5], plan[7], plan[8], plan[9], plan[10]
    layers, hidden, heads, groups, width = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    return Work(
        floats(a[23], rows, hidden), floats(a[24], rows, (heads + 2 * groups) * width),
        carray(pointer(a[25]), (groups, rows, heads // groups, width), np.uint16), _whole(a[26], 3, room),
        floats(a[27], rows, layer_sites, 2), floats(a[28], rows, sites), _whole(a[29], sites),
        floats(a[30], kept, sizes[6]), floats(a[31], threads, 6, span),
        carray(pointer(a[32]), (threads, 6, span), np.uint16), _whole(a[33], threads, room),
        _whole(a[34], 8 * (layers + 1)),
    )  # fmt: skip


@cache
def address() -> int:
    """Return the address of the compiled step, `void step(int64 *addresses)` (see `infer/compiled.py`).

    Numba keeps it on disk until this file changes; the sum over what it is built from makes it note the others too.
    """
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(few_tokens.__file__), Path(int8.__file__)]
    sources = crc32(b"".join(path.read_bytes() for path in files))

    @cfunc(types.void(types.CPointer(types.int64)), cache=True)
    def step(data):  # type: ignore[no-untyped-def]
        _ = sources  # in the key under which numba keeps it
        a = carray(data, 36)
        plan = _whole(a[15], a[16])
        weights = _weights(a, a[35])
        batch, at = _batch(plan)
        _run(weights, batch, _sites(a, plan, at, weights.sizes[0], weights.sizes[1]), _work(a, plan, weights.sizes))

    return int(step.address)


def run(addresses: list[int]) -> None:
    """Compute one forward pass."""
    openmp.parallel(address(), addresses)
