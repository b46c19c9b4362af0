"""One forward pass of a dense transformer over a ragged batch, on all threads of torch's pool, in one call.

The weights are read once, whatever the number of rows. Between two stages, of which each needs all of the one before,
threads meet at a barrier; within a stage they share panels of weights, rows or units of attention.
"""

from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
from numba import njit

from deepseek.compiled import abi, expert_sites, paged_attention, rows, vector
from deepseek.compiled.abi import KINDS, Batch, Sites, Weights, Work
from deepseek.compiled.expert_sites import activate_experts, add_experts, score_row, weigh
from deepseek.compiled.paged_attention import attend, place_heads
from deepseek.compiled.rows import activate, add_projected, barrier, embed, norm_row, project, round_group
from deepseek.kernels import int8
from deepseek.kernels.int8 import COLUMNS, GROUP
from deepseek.kernels.numba import launch, openmp, primitives
from deepseek.kernels.numba.primitives import share, thread_number


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
            score_row(batch, sites, work, layer, r, normed)


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
        weigh(batch, sites, work, layer)
        barrier(counter)
    first, last = share(inner)
    table, groups = work.tables[0].ctypes.data, _blocks(hidden, GROUP)
    activate(weights.gate_up[layer], first, last, table, rows, groups, inner, work.tables[2, 0])
    activate_experts(weights, sites, work, layer, thread_number(), rows)
    barrier(counter)
    first, last = _panels(hidden)
    add_projected(weights.down[layer], first, last, work.tables[2].ctypes.data, places, ones, inner, zeros, work.stream)
    add_experts(sites, work, layer, thread_number(), rows, first, last, zeros)
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
    project(weights.head[0], first, last, work.tables[0].ctypes.data, len(batch.kept), groups, batch.logits)


@cache
def address() -> int:
    """Return the address of the compiled step, `void step(int64 *places)`; `unpack` reads `KINDS` there.

    Numba keeps it on disk until this file changes; the sum over what it is built from makes it note the others too.
    """
    rooms = (abi, expert_sites, paged_attention, rows, vector, primitives, int8, launch)
    files = [Path(__file__), *(Path(str(room.__file__)) for room in rooms)]
    sources = crc32(b"".join(path.read_bytes() for path in files))

    def step(data):  # type: ignore[no-untyped-def]
        _ = sources  # in the key under which numba keeps it
        a = launch.unpack(data, KINDS)
        _run(Weights(*a[:15]), Batch(*a[15:29]), Sites(*a[29:35]), Work(*a[35:]))

    return launch.compiled(step)


def run(places: list[int]) -> None:
    """Compute one forward pass over the arrays at `places` (see `launch.placed`), in the order of `KINDS`."""
    openmp.parallel(address(), places)
