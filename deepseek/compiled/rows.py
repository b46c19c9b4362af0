"""Rows of activations: quantisation, and products with panels of weights.

A quantised row of G groups is stored as 64 G bytes, G scales in fp32 and G corrections in int32
(see `kernels/int8_layout.py`). Rows are passed as a table of their addresses. The result for a row
never depends on the other rows.
"""

import platform
import sys

import numpy as np
from numba import carray, types

from deepseek.compiled.abi import BLOCK, BY_TILES, FEWEST_TILE_ROWS, FOUR_BITS, TILE_BLOCK
from deepseek.compiled.panel_dot import (
    nibble_dot_1,
    nibble_dot_2,
    nibble_dot_4,
    nibble_dot_8,
    panel_dot_1,
    panel_dot_2,
    panel_dot_4,
    panel_dot_8,
)
from deepseek.compiled.tile_dot import OPENED_BYTES, RING_BYTES, open_bytes, open_nibbles, tile_dot
from deepseek.compiled.vector import arrive, look, rotate, rotate_and_round
from deepseek.kernels import int8_layout
from deepseek.kernels.int8_layout import COLUMNS, GROUP, LANES
from deepseek.kernels.numba import amx, openmp
from deepseek.kernels.numba.primitives import pointer, sigmoid, thread_count
from deepseek.kernels.numba.subroutine import subroutine

# System call number of Linux's futex, which sleeps until a number in memory changes. On other
# systems a waiting thread only yields.
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
_WAIT = 0
_WAKE = 1
_ALL = 1 << 30
_syscall = openmp.external("syscall", types.int64(*[types.int64] * 7))
_yield = openmp.external("sched_yield", types.int32())

row_bytes = subroutine(int8_layout.row_bytes)
_group_bytes = subroutine(int8_layout.group_bytes)
# Number of spins at the barrier, about 40 microseconds, before the thread gives up its core. The
# threads drift apart within a stage; sleeping within that time costs more than it saves, because a
# thread that slept is late at the next barrier too, where the other one then sleeps.
SPINS = 40_000


@subroutine(error_model="numpy")
def barrier(counter):  # type: ignore[no-untyped-def]
    """Wait until every thread has called this.

    `counter` is the address of two int64s, initially 0: the number of arrivals, and the number of
    sleeping threads. Waits are short while cores are free, so a thread spins for a while before it
    sleeps.
    """
    threads = thread_count()
    sleepers = counter + 8
    before = arrive(counter, 1)
    goal = (before // threads + 1) * threads
    if before + 1 == goal and look(sleepers) > 0:
        arrive(sleepers, -look(sleepers))
        _syscall(_FUTEX, counter, _WAKE, _ALL, 0, 0, 0)
    spins = 0
    seen = look(counter)
    while seen < goal:
        spins += 1
        if spins > SPINS and _FUTEX:
            arrive(sleepers, 1)
            # Returns at once if the number is no longer `seen`, so that no wake-up is missed.
            _syscall(_FUTEX, counter, _WAIT, seen, 0, 0, 0)
        elif spins > SPINS:
            _yield()
        seen = look(counter)


@subroutine(error_model="numpy")
def floats(address, *shape):  # type: ignore[no-untyped-def]
    """Return the fp32 numbers at an address as an array of the given shape."""
    return carray(pointer(address), shape, np.float32)


@subroutine(error_model="numpy")
def round_group(x, row, group, groups):  # type: ignore[no-untyped-def]
    """Quantise the 64 numbers at address `x` as group `group` of the row at address `row`."""
    scale = row + GROUP * groups + 4 * group
    rotate_and_round(x, row + GROUP * group, scale, scale + 4 * groups)


@subroutine(error_model="numpy")
def put_attended(weights, work, r, head, attended):  # type: ignore[no-untyped-def]
    """Quantise the output of a head as part of row `r`'s input of the output projection."""
    width = weights.width
    if width % GROUP:  # a group of 64 holds parts of two heads: `round_attended` rounds them
        work.attended[r, head * width : (head + 1) * width] = attended[:width]
        return
    for part in range(width // GROUP):
        x = attended.ctypes.data + part * GROUP * 4
        place = head * (width // GROUP) + part
        round_group(x, work.attended_rows[r], place, weights.heads * width // GROUP)


@subroutine(fastmath=True, error_model="numpy")
def norm_row(x, weight, eps, out):  # type: ignore[no-untyped-def]
    """Set `out` to the RMS-normalised `x` (see `model/norm.py`)."""
    total = np.float32(0)
    for d in range(len(weight)):
        total += x[d] * x[d]
    factor = np.float32(1) / np.sqrt(total / np.float32(len(weight)) + eps)
    for d in range(len(weight)):
        out[d] = x[d] * factor * weight[d]


@subroutine(error_model="numpy")
def embed(table, token, groups, out):  # type: ignore[no-untyped-def]
    """Set `out` to the embedding of `token`, dequantised from a packed matrix."""
    tile = token % COLUMNS // LANES
    lane = token % LANES
    rotated = np.empty(GROUP, np.float32)
    bits = _weight_bits(table)
    block_bytes = _group_bytes(bits)
    panel = _panel_at(table, token // COLUMNS, groups)
    for g in range(groups):
        block = panel + g * block_bytes
        weight_bytes = block_bytes - 2 * COLUMNS
        values = carray(pointer(block), (GROUP // 4, 2, LANES, 4), np.uint8)
        scales = carray(pointer(block + weight_bytes), (2, LANES), np.uint16)
        scale = np.uint32(scales[tile, lane]) << np.uint32(16)  # bf16 as the upper half of fp32
        for i in range(GROUP):
            if bits == 4:
                pair = values[i // 8, tile, lane, i % 4]
                rotated[i] = np.float32((pair >> (4 * (i // 4 % 2))) & 15) - np.float32(8)
            else:
                rotated[i] = np.float32(values[i // 4, tile, lane, i % 4]) - np.float32(128)
        rotate(rotated.ctypes.data)
        factor = np.array([scale], np.uint32).view(np.float32)[0]
        group = out[g * GROUP : (g + 1) * GROUP]
        for i in range(len(group)):
            group[i] = rotated[i] * factor


def _multiplier(dot_1, dot_2, dot_4, dot_8):  # type: ignore[no-untyped-def]
    """Return the function that multiplies a panel by any number of rows."""

    @subroutine(error_model="numpy")
    def multiply_panel(panel, table, count, groups, out):  # type: ignore[no-untyped-def]
        row = 0
        while row + 8 <= count:
            dot_8(panel, table + 8 * row, groups, out + 4 * COLUMNS * row)
            row += 8
        while row + 4 <= count:
            dot_4(panel, table + 8 * row, groups, out + 4 * COLUMNS * row)
            row += 4
        if row + 2 <= count:
            dot_2(panel, table + 8 * row, groups, out + 4 * COLUMNS * row)
            row += 2
        if row < count:
            dot_1(panel, table + 8 * row, groups, out + 4 * COLUMNS * row)

    return multiply_panel


_multiply_bytes = _multiplier(panel_dot_1, panel_dot_2, panel_dot_4, panel_dot_8)
_multiply_nibbles = _multiplier(nibble_dot_1, nibble_dot_2, nibble_dot_4, nibble_dot_8)


@subroutine(error_model="numpy")
def _weight_bits(panels):  # type: ignore[no-untyped-def]
    """Return the bits of the weights at an address of panels, 8 or 4 (see `compiled/abi.py`)."""
    return 4 if panels & FOUR_BITS else 8


@subroutine(error_model="numpy")
def _panel_at(panels, panel, groups):  # type: ignore[no-untyped-def]
    """Return the address of a panel, without marks."""
    return (panels & ~(FOUR_BITS | BY_TILES)) + panel * groups * _group_bytes(_weight_bits(panels))


@subroutine(error_model="numpy")
def multiply(panels, panel, table, count, groups, out):  # type: ignore[no-untyped-def]
    """Multiply panel `panel` of `panels` by `count` rows.

    `out` is the address of the product, fp32 `[count, 32]`.
    """
    address = _panel_at(panels, panel, groups)
    if _weight_bits(panels) == 4:
        _multiply_nibbles(address, table, count, groups, out)
    else:
        _multiply_bytes(address, table, count, groups, out)


@subroutine(error_model="numpy")
def tile_workspace(panels, number, table, count, groups):  # type: ignore[no-untyped-def]
    """Return memory for `number` opened panels if tiles are to multiply them by `count` rows; else
    an empty array.

    The rows must lie at equal distances. Tables are in the order of the rows in memory.
    """
    size = 0
    if panels & BY_TILES and count >= FEWEST_TILE_ROWS:
        rows = carray(pointer(table), (count,), np.int64)
        if rows[count - 1] - rows[0] == (count - 1) * row_bytes(groups):
            amx.configure()
            size = RING_BYTES + number * groups * OPENED_BYTES + 64
    return np.empty(size, np.uint8)


@subroutine(error_model="numpy")
def _ring(workspace):  # type: ignore[no-untyped-def]
    """Return the address of the ring of sums; the opened panels lie behind it."""
    return (workspace.ctypes.data + 63) // 64 * 64


@subroutine(error_model="numpy")
def open_panels(panels, first, number, groups, workspace):  # type: ignore[no-untyped-def]
    """Open `number` panels from panel `first` on."""
    for i in range(number):
        panel = _panel_at(panels, first + i, groups)
        opened = _ring(workspace) + RING_BYTES + i * groups * OPENED_BYTES
        if _weight_bits(panels) == 4:
            open_nibbles(panel, groups, opened)
        else:
            open_bytes(panel, groups, opened)


@subroutine(error_model="numpy")
def multiply_opened(workspace, i, table, count, groups, out):  # type: ignore[no-untyped-def]
    """Multiply the opened panel number `i` by `count` rows, as `multiply` does."""
    ring = _ring(workspace)
    opened = ring + RING_BYTES + i * groups * OPENED_BYTES
    rows = carray(pointer(table), (1,), np.int64)[0]
    tile_dot(opened, rows, row_bytes(groups), count, groups, out, ring)


@subroutine(error_model="numpy")
def _multiply(panels, panel, i, table, count, groups, out, workspace):  # type: ignore[no-untyped-def]
    """Multiply panel `panel`, which is number `i` of the opened ones, by `count` rows."""
    if len(workspace) and count >= amx.ROWS:
        multiply_opened(workspace, i, table, count, groups, out)
    else:
        multiply(panels, panel, table, count, groups, out)


@subroutine(error_model="numpy")
def project(panels, first, last, table, count, groups, out):  # type: ignore[no-untyped-def]
    """Compute the columns of `out` `[count, F]` that belong to panels `first` to `last - 1`."""
    workspace = tile_workspace(panels, 1, table, count, groups)
    block = TILE_BLOCK if len(workspace) else BLOCK
    product = np.empty((block, COLUMNS), np.float32)
    for panel in range(first, last):
        if len(workspace):
            open_panels(panels, panel, 1, groups, workspace)
        columns = min(COLUMNS, out.shape[1] - panel * COLUMNS)
        for start in range(0, count, block):
            rows = min(block, count - start)
            place = product.ctypes.data
            _multiply(panels, panel, 0, table + 8 * start, rows, groups, place, workspace)
            for r in range(rows):
                out[start + r, panel * COLUMNS : panel * COLUMNS + columns] = product[r, :columns]


@subroutine(error_model="numpy")
def _add(target, product, bias, factor):  # type: ignore[no-untyped-def]
    for c in range(len(target)):
        target[c] += factor * (product[c] + bias[c])


@subroutine(error_model="numpy")
def add_projected(panels, first, last, table, places, factors, groups, bias, residual):  # type: ignore[no-untyped-def]
    """Add `factors[i]` times (product of row i + `bias`) to `residual[places[i]]`.

    Only the columns of panels `first` to `last - 1` are computed, as in `project`.
    """
    workspace = tile_workspace(panels, 1, table, len(places), groups)
    block = TILE_BLOCK if len(workspace) else BLOCK
    product = np.empty((block, COLUMNS), np.float32)
    for panel in range(first, last):
        if len(workspace):
            open_panels(panels, panel, 1, groups, workspace)
        columns = min(COLUMNS, residual.shape[1] - panel * COLUMNS)
        for start in range(0, len(places), block):
            rows = min(block, len(places) - start)
            place = product.ctypes.data
            _multiply(panels, panel, 0, table + 8 * start, rows, groups, place, workspace)
            for r in range(rows):
                target = residual[places[start + r], panel * COLUMNS : panel * COLUMNS + columns]
                _add(
                    target,
                    product[r],
                    bias[panel * COLUMNS : panel * COLUMNS + columns],
                    factors[start + r],
                )


@subroutine(fastmath=True, error_model="numpy")
def _gate(gates, ups, hidden):  # type: ignore[no-untyped-def]
    """Compute SwiGLU: SiLU of the gates, times the ups."""
    for f in range(len(hidden)):
        hidden[f] = gates[f] * sigmoid(gates[f]) * ups[f]


@subroutine(fastmath=True, error_model="numpy")
def _gelu_gate(gates, ups, hidden):  # type: ignore[no-untyped-def]
    """Compute GeGLU: GELU of the gates in its tanh form, times the ups."""
    for f in range(len(hidden)):
        x = gates[f]
        # 0.5 (1 + tanh(z)) is the logistic function of 2 z.
        z = np.float32(1.5957691216) * (x + np.float32(0.044715) * x * x * x)
        hidden[f] = x * sigmoid(z) * ups[f]


@subroutine(error_model="numpy")
def activate(panels, first, last, table, count, groups, inner, out, gelu):  # type: ignore[no-untyped-def]
    """Compute and quantise groups `first` to `last - 1` of the hidden values of `count` rows:
    SwiGLU, or GeGLU if `gelu`.

    A row of hidden values has `inner` groups; the first one is at address `out`.
    """
    quarters = GROUP // LANES
    workspace = tile_workspace(panels, quarters, table, count, groups)
    block = TILE_BLOCK if len(workspace) else BLOCK
    product = np.empty((block, COLUMNS), np.float32)
    hidden = np.empty((block, GROUP), np.float32)
    for group in range(first, last):
        panel = quarters * group
        if len(workspace):
            open_panels(panels, panel, quarters, groups, workspace)
        for start in range(0, count, block):
            rows = min(block, count - start)
            for quarter in range(quarters):
                place = product.ctypes.data
                _multiply(
                    panels,
                    panel + quarter,
                    quarter,
                    table + 8 * start,
                    rows,
                    groups,
                    place,
                    workspace,
                )
                for r in range(rows):
                    quarter_r = hidden[r, quarter * LANES : (quarter + 1) * LANES]
                    if gelu:
                        _gelu_gate(product[r, :LANES], product[r, LANES:], quarter_r)
                    else:
                        _gate(product[r, :LANES], product[r, LANES:], quarter_r)
            for r in range(rows):
                round_group(
                    hidden[r].ctypes.data, out + (start + r) * row_bytes(inner), group, inner
                )
