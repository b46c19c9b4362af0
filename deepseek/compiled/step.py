"""One forward pass of a transformer over a ragged batch, in one call on all threads of torch's
pool.

Each weight is read once, whatever the number of rows. Within a stage, the threads share panels of
weights, rows or units of attention. A barrier separates two stages if the second needs all results
of the first.
"""

from functools import cache
from itertools import chain
from pathlib import Path
from zlib import crc32

import numpy as np

from deepseek.compiled.abi import FAR_FIELD, TABLES
from deepseek.compiled.expert_sites import activate_experts, add_experts, score_row, weigh
from deepseek.compiled.far_field import place_page_sums
from deepseek.compiled.hashed_attention import attend_hashed
from deepseek.compiled.heads import place_heads
from deepseek.compiled.native_experts import (
    activate_routed,
    add_routed,
    route,
    router_blocks,
    rows_by_expert,
    score_experts,
)
from deepseek.compiled.paged_attention import attend, round_attended
from deepseek.compiled.products import activate, add_projected, embed, project
from deepseek.compiled.rows import barrier, norm_row, round_group, row_bytes
from deepseek.compiled.score_bias import place_bias
from deepseek.compiled.soft_cap import cap_columns
from deepseek.kernels.int8_layout import COLUMNS, GROUP
from deepseek.kernels.numba import amx, launch, openmp
from deepseek.kernels.numba.buffers import KernelArguments
from deepseek.kernels.numba.primitives import share, thread_number
from deepseek.kernels.numba.subroutine import subroutine
from deepseek.model.experts import gate

PACKAGE = Path(__file__).parents[1]
SOURCES = (
    "compiled/abi.py",
    "compiled/bits.py",
    "compiled/candidates.py",
    "compiled/expert_sites.py",
    "compiled/far_field.py",
    "compiled/hashed_attention.py",
    "compiled/heads.py",
    "compiled/native_experts.py",
    "compiled/paged_attention.py",
    "compiled/pages.py",
    "compiled/panel_dot.py",
    "compiled/panel_results.py",
    "compiled/products.py",
    "compiled/rows.py",
    "compiled/score_bias.py",
    "compiled/soft_cap.py",
    "compiled/softmax.py",
    "compiled/step.py",
    "compiled/tile_attention.py",
    "compiled/tile_dot.py",
    "compiled/token_dot.py",
    "compiled/vector.py",
    "kernels/bias/distance.py",
    "kernels/int8_layout.py",
    "kernels/numba/amx.py",
    "kernels/numba/buffers.py",
    "kernels/numba/emit.py",
    "kernels/numba/launch.py",
    "kernels/numba/openmp.py",
    "kernels/numba/primitives.py",
    "kernels/numba/subroutine.py",
    "kernels/numba/vector_math.py",
)
"""The files of the package that the step is compiled from."""

read_tables = launch.reader(*TABLES)


@subroutine(error_model="numpy")
def _blocks(count, size):  # type: ignore[no-untyped-def]
    return (count + size - 1) // size


@subroutine(error_model="numpy")
def _panels(outputs):  # type: ignore[no-untyped-def]
    """Return this thread's panels of a matrix with `outputs` outputs: the first, and the one past
    the last.
    """
    return share(_blocks(outputs, COLUMNS))


@subroutine(fastmath=True, error_model="numpy")
def _add(target, x):  # type: ignore[no-untyped-def]
    for d in range(len(target)):
        target[d] += x[d]


@subroutine(fastmath=True, error_model="numpy")
def _scale(x, factor):  # type: ignore[no-untyped-def]
    for d in range(len(x)):
        x[d] *= factor


@subroutine(error_model="numpy")
def _sum_of_outputs(weights, work):  # type: ignore[no-untyped-def]
    """Return the buffer for outputs: the residual stream, or `update` if they are normed first."""
    return work.update if len(weights.post_norms) else work.residual


@subroutine(error_model="numpy")
def _add_update(weights, work, place, r, normed):  # type: ignore[no-untyped-def]
    """Add the outputs of the sublayer before norm `place` to row `r` of the residual stream, if
    they have a norm of their own; `normed` receives what is added.
    """
    if len(weights.post_norms) == 0 or place == 0:
        return
    update = work.update[r]
    norm_row(update, weights.post_norms[place - 1], weights.eps[0], normed)
    _add(work.residual[r], normed)
    update[:] = 0


@subroutine(error_model="numpy")
def _add_updates(weights, work, place, rows):  # type: ignore[no-untyped-def]
    """Add the outputs before norm `place` to all rows."""
    normed = np.empty(weights.hidden, np.float32)
    first, last = share(rows)
    for r in range(first, last):
        _add_update(weights, work, place, r, normed)


@subroutine(error_model="numpy")
def _round(weights, work, target, normed):  # type: ignore[no-untyped-def]
    """Quantise a normalised row as input row `target`."""
    groups = _blocks(weights.hidden, GROUP)
    for g in range(groups):
        round_group(normed[g * GROUP :].ctypes.data, work.normed_rows[target], g, groups)


@subroutine(error_model="numpy")
def _norm_and_round(weights, work, place, source, target, normed):  # type: ignore[no-untyped-def]
    """Normalise and quantise row `source` of the residual stream as input row `target`.

    `place` is the index of the norm's scales; `normed` receives the normalised row.
    """
    _add_update(weights, work, place, source, normed)
    norm_row(work.residual[source], weights.norms[place], weights.eps[0], normed)
    _round(weights, work, target, normed)


@subroutine(error_model="numpy")
def _prepare(weights, batch, work, place):  # type: ignore[no-untyped-def]
    """Normalise and quantise this thread's rows."""
    normed = np.zeros(_blocks(weights.hidden, GROUP) * GROUP, np.float32)
    first, last = share(len(batch.input_ids))
    for r in range(first, last):
        _norm_and_round(weights, work, place, r, r, normed)


@subroutine(error_model="numpy")
def _prepare_experts(weights, batch, sites, routed, work, layer):  # type: ignore[no-untyped-def]
    """Normalise and quantise the input of the feed-forward network, and compute the gate scores of
    `layer`'s plugged experts and the router logits of its native ones.

    The rows, or the blocks of router logits at all rows, are divided among the threads.
    """
    normed = np.zeros(_blocks(weights.hidden, GROUP) * GROUP, np.float32)
    plugged = sites.first_site[layer + 1] > sites.first_site[layer]
    blocks = router_blocks(routed, layer)
    shares = max(1, blocks)
    first, last = share(len(batch.input_ids) * shares)
    for r in range(first // shares, _blocks(last, shares)):
        norm_row(work.residual[r], weights.norms[2 * layer + 1], weights.eps[0], normed)
        if r * shares >= first:  # the row's first block is this thread's
            _round(weights, work, r, normed)
            if plugged:
                score_row(batch, sites, work, layer, r, normed)
        for block in range(max(0, first - r * shares), min(blocks, last - r * shares)):
            score_experts(routed, work, layer, r, block, normed)


@subroutine(error_model="numpy")
def _enter(weights, batch, work):  # type: ignore[no-untyped-def]
    """Set this thread's rows of the residual stream where the batch enters the model."""
    groups = _blocks(weights.hidden, GROUP)
    first, last = share(len(batch.input_ids))
    for r in range(first, last):
        if batch.entry < 0:
            embed(weights.embed_tokens, batch.input_ids[r], groups, work.residual[r])
            _scale(work.residual[r], weights.embed_scale[0])
        else:
            work.residual[r] = batch.entering[r]
        work.update[r] = 0


@subroutine(error_model="numpy")
def _keep_stream(batch, work, layer):  # type: ignore[no-untyped-def]
    """Copy this thread's rows of the residual stream after the attention of a layer with a cut."""
    cut = batch.cut_of_layer[layer]
    if cut >= 0:
        first, last = share(len(batch.input_ids))
        for r in range(first, last):
            batch.streams[cut, r] = work.residual[r]


@subroutine(error_model="numpy")
def _attention(weights, batch, work, layer, counter, places, ones):  # type: ignore[no-untyped-def]
    """Add the attention of a layer to the residual stream."""
    rows = len(batch.input_ids)
    groups = _blocks(weights.hidden, GROUP)
    _prepare(weights, batch, work, 2 * layer)
    barrier(counter)
    table = work.normed_rows.ctypes.data
    # The panels of both matrices are shared as if they were one.
    panels = _blocks((weights.heads + 2 * weights.groups) * weights.width, COLUMNS)
    first, last = share(panels + _blocks(work.signals.shape[1], COLUMNS))
    stop = min(last, panels)
    project(weights.qkv[layer], first, stop, table, rows, groups, work.projected)
    first = max(first - panels, 0)
    project(weights.signals[layer], first, last - panels, table, rows, groups, work.signals)
    barrier(counter)
    place_heads(weights, batch, work, layer)
    place_bias(weights, batch, work, layer)
    barrier(counter)
    if weights.hashes[layer] == 0:
        attend(weights, batch, work, layer)
    else:
        if weights.lsh[FAR_FIELD]:
            place_page_sums(weights, batch, layer)
            barrier(counter)
        attend_hashed(weights, batch, work, layer)
    barrier(counter)
    if work.attended.shape[1]:
        round_attended(work, rows)
        barrier(counter)
    first, last = _panels(weights.hidden)
    table = work.attended_rows.ctypes.data
    groups = _blocks(weights.heads * weights.width, GROUP)
    bias = weights.out_bias[layer]
    target = _sum_of_outputs(weights, work)
    add_projected(weights.out[layer], first, last, table, places, ones, groups, bias, target)
    barrier(counter)
    if len(weights.post_norms):
        _add_updates(weights, work, 2 * layer + 1, rows)
        barrier(counter)


@subroutine(error_model="numpy")
def _feed_forward(weights, batch, sites, routed, work, layer, counter, places, ones, zeros):  # type: ignore[no-untyped-def]
    """Add the feed-forward network of a layer and its experts to the residual stream."""
    rows = len(batch.input_ids)
    _prepare_experts(weights, batch, sites, routed, work, layer)
    barrier(counter)
    plugged = sites.first_site[layer + 1] > sites.first_site[layer]
    if plugged:
        weigh(batch, sites, work, layer)
    if routed.sparse[layer]:
        route(routed, work, layer, rows)
    if plugged or routed.sparse[layer]:
        barrier(counter)
    if layer == weights.layers - 1 and len(batch.kept_rows) == 0:
        return  # within a prompt, nothing reads the residual stream after the last attention
    inner = weights.inner[layer]
    first, last = share(inner)
    table = work.normed_rows.ctypes.data
    groups = _blocks(weights.hidden, GROUP)
    inner_rows = work.inner_rows[0]
    gelu = weights.activation
    activate(weights.gate_up[layer], first, last, table, rows, groups, inner, inner_rows, gelu)
    calls = rows_by_expert(routed, work, layer, rows)
    activate_routed(weights, routed, work, layer, calls)
    activate_experts(weights, sites, work, layer, thread_number(), rows)
    barrier(counter)
    first, last = _panels(weights.hidden)
    target = _sum_of_outputs(weights, work)
    if inner:
        hidden_rows = work.selected_rows[thread_number()]
        for r in range(rows):
            hidden_rows[r] = inner_rows + r * row_bytes(inner)
        table = hidden_rows.ctypes.data
        add_projected(weights.down[layer], first, last, table, places, ones, inner, zeros, target)
    add_routed(routed, work, layer, calls, first, last, zeros, target)
    add_experts(sites, work, layer, thread_number(), rows, first, last, zeros, target)
    barrier(counter)


@subroutine(error_model="numpy")
def _run(weights, batch, sites, routed, work):  # type: ignore[no-untyped-def]
    """Run the forward pass; every thread calls this."""
    rows = len(batch.input_ids)
    groups = _blocks(weights.hidden, GROUP)
    counter = work.sync.ctypes.data
    places = np.arange(rows)
    ones = np.ones(rows, np.float32)
    zeros = np.zeros(weights.hidden, np.float32)
    _enter(weights, batch, work)
    barrier(counter)
    for layer in range(max(0, batch.entry), weights.layers):
        if layer != batch.entry:
            _attention(weights, batch, work, layer, counter, places, ones)
            _keep_stream(batch, work, layer)
        _feed_forward(weights, batch, sites, routed, work, layer, counter, places, ones, zeros)
    normed = np.zeros(groups * GROUP, np.float32)
    kept = len(batch.kept_rows)
    first, last = share(kept)
    for i in range(first, last):
        _norm_and_round(weights, work, 2 * weights.layers, batch.kept_rows[i], i, normed)
    barrier(counter)
    first, last = _panels(weights.vocabulary)
    project(weights.lm_head, first, last, work.normed_rows.ctypes.data, kept, groups, batch.logits)
    if weights.logit_cap[0] > 0:
        cap_columns(batch.logits, first * COLUMNS, last * COLUMNS, weights.logit_cap[0])
    if weights.tiles:
        amx.release()


@cache
def address() -> int:
    """Return the address of the compiled step, `void step(int64 *numbers)`, whose numbers
    `read_tables` reads.

    It is recompiled when one of `SOURCES` or `gate.SHARPNESS` changes.
    """
    source = b"".join((PACKAGE / name).read_bytes() for name in SOURCES)

    def step(data):  # type: ignore[no-untyped-def]
        weights, batch, sites, routed, work = read_tables(data)
        _run(weights, batch, sites, routed, work)

    return launch.compiled(step, (crc32(source), gate.SHARPNESS))


def run(
    weights: KernelArguments,
    batch: KernelArguments,
    sites: KernelArguments,
    routed: KernelArguments,
    work: KernelArguments,
) -> None:
    """Run one forward pass.

    Args:
        weights, batch, sites, routed, work: the arguments of the five `TABLES`.
    """
    groups = (weights, batch, sites, routed, work)
    openmp.parallel(address(), [*chain.from_iterable(arguments.numbers for arguments in groups)])
