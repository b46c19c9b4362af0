"""Products of packed weights and quantised rows: projections and activations.

Rows are passed as a table of their addresses. A panel of weights is multiplied by many rows at a
time: by AMX tiles if there are enough rows (`tile_dot.py`), else by vectors (`panel_dot.py`). Both
give the same bits, and the result for a row never depends on the other rows.
"""

import numpy as np
from numba import carray

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
from deepseek.compiled.panel_results import add_rows, copy_rows, gelu_rows, silu_rows
from deepseek.compiled.rows import round_group, row_bytes
from deepseek.compiled.tile_dot import OPENED_BYTES, RING_BYTES, open_bytes, open_nibbles, tile_dot
from deepseek.compiled.vector import rotate
from deepseek.kernels import int8_layout
from deepseek.kernels.int8_layout import COLUMNS, GROUP, LANES
from deepseek.kernels.numba import amx
from deepseek.kernels.numba.primitives import pointer
from deepseek.kernels.numba.subroutine import subroutine

_group_bytes = subroutine(int8_layout.group_bytes)


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
def _header(workspace):  # type: ignore[no-untyped-def]
    """Return the address of a workspace in whole cache lines."""
    return (workspace.ctypes.data + 63) // 64 * 64


@subroutine(error_model="numpy")
def _opened(workspace, i, groups):  # type: ignore[no-untyped-def]
    """Return the address of opened panel number `i` of a workspace."""
    return _header(workspace) + 64 + RING_BYTES + i * groups * OPENED_BYTES


@subroutine(error_model="numpy")
def tile_workspace(panels, number, table, count, groups):  # type: ignore[no-untyped-def]
    """Return memory for `number` opened panels if tiles are to multiply them by `count` rows; else
    an empty array.

    It holds the address of the first row, the ring of sums, and the opened panels. Tiles need rows
    at equal distances; other rows are copied behind the panels. Addresses in a table ascend.
    """
    if not panels & BY_TILES or count < FEWEST_TILE_ROWS:
        return np.empty(0, np.uint8)
    amx.configure()
    size = row_bytes(groups)
    rows = carray(pointer(table), (count,), np.int64)
    regular = rows[count - 1] - rows[0] == (count - 1) * size
    panel_bytes = number * groups * OPENED_BYTES
    copies = 0 if regular else count * size
    workspace = np.empty(64 + RING_BYTES + panel_bytes + copies + 64, np.uint8)
    first_row = carray(pointer(_header(workspace)), (1,), np.int64)
    first_row[0] = rows[0]
    if not regular:
        first_row[0] = _opened(workspace, 0, groups) + panel_bytes
        for i in range(count):
            source = carray(pointer(rows[i]), (size // 8,), np.int64)
            target = carray(pointer(first_row[0] + i * size), (size // 8,), np.int64)
            target[:] = source
    return workspace


@subroutine(error_model="numpy")
def _open(panels, first, number, groups, workspace):  # type: ignore[no-untyped-def]
    """Open `number` panels from panel `first` on, unless the workspace is empty."""
    for i in range(number if len(workspace) else 0):
        panel = _panel_at(panels, first + i, groups)
        opened = _opened(workspace, i, groups)
        if _weight_bits(panels) == 4:
            open_nibbles(panel, groups, opened)
        else:
            open_bytes(panel, groups, opened)


@subroutine(error_model="numpy")
def _multiply(panels, panel, i, table, start, count, groups, out, workspace):  # type: ignore[no-untyped-def]
    """Multiply panel `panel`, which is number `i` of the opened ones, by rows `start` to
    `start + count - 1` of a table.
    """
    if len(workspace) and count >= amx.ROWS:
        header = _header(workspace)
        rows = carray(pointer(header), (1,), np.int64)[0] + start * row_bytes(groups)
        opened = _opened(workspace, i, groups)
        tile_dot(opened, rows, row_bytes(groups), count, groups, out, header + 64)
    else:
        multiply(panels, panel, table + 8 * start, count, groups, out)


@subroutine(error_model="numpy")
def project(panels, first, last, table, count, groups, out):  # type: ignore[no-untyped-def]
    """Compute the columns of `out` `[count, F]` that belong to panels `first` to `last - 1`."""
    workspace = tile_workspace(panels, 1, table, count, groups)
    block = TILE_BLOCK if len(workspace) else BLOCK
    product = np.empty((block, COLUMNS), np.float32)
    for panel in range(first, last):
        _open(panels, panel, 1, groups, workspace)
        columns = min(COLUMNS, out.shape[1] - panel * COLUMNS)
        for start in range(0, count, block):
            rows = min(block, count - start)
            place = product.ctypes.data
            _multiply(panels, panel, 0, table, start, rows, groups, place, workspace)
            if columns == COLUMNS:
                target = out[start, panel * COLUMNS :].ctypes.data
                copy_rows(place, rows, target, out.strides[0])
                continue
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
        _open(panels, panel, 1, groups, workspace)
        columns = min(COLUMNS, residual.shape[1] - panel * COLUMNS)
        for start in range(0, len(places), block):
            rows = min(block, len(places) - start)
            place = product.ctypes.data
            _multiply(panels, panel, 0, table, start, rows, groups, place, workspace)
            if columns == COLUMNS:
                add_rows(
                    place,
                    rows,
                    places[start:].ctypes.data,
                    factors[start:].ctypes.data,
                    bias[panel * COLUMNS :].ctypes.data,
                    residual[0, panel * COLUMNS :].ctypes.data,
                    residual.strides[0],
                )
                continue
            for r in range(rows):
                target = residual[places[start + r], panel * COLUMNS : panel * COLUMNS + columns]
                _add(
                    target,
                    product[r],
                    bias[panel * COLUMNS : panel * COLUMNS + columns],
                    factors[start + r],
                )


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
        _open(panels, panel, quarters, groups, workspace)
        for start in range(0, count, block):
            rows = min(block, count - start)
            for quarter in range(quarters):
                place = product.ctypes.data
                _multiply(
                    panels, panel + quarter, quarter, table, start, rows, groups, place, workspace
                )
                values = hidden[0, quarter * LANES :].ctypes.data
                if gelu:
                    gelu_rows(place, rows, values)
                else:
                    silu_rows(place, rows, values)
            for r in range(rows):
                round_group(
                    hidden[r].ctypes.data, out + (start + r) * row_bytes(inner), group, inner
                )
