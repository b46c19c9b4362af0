"""Products by AMX tiles are bit-identical to those by vectors: projections, networks, any rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from deepseek.compiled.abi import BY_TILES, FEWEST_TILE_ROWS, FOUR_BITS
from deepseek.compiled.products import activate, add_projected, project
from deepseek.compiled.rows import round_group, row_bytes
from deepseek.kernels.int8 import pack, quantize
from deepseek.kernels.int8_layout import COLUMNS, GROUP
from deepseek.kernels.numba import amx
from deepseek.kernels.numba.buffers import aligned

pytestmark = pytest.mark.skipif(not amx.available(), reason="this processor has no tiles")


@njit
def round_rows(x, table, groups):
    for r in range(len(x)):
        for group in range(groups):
            round_group(x[r, GROUP * group :].ctypes.data, table[r], group, groups)


@njit
def run(panels, count, table, groups, projected, gated, hidden, inner, residual, places, zeros):
    """Run all three products on panels, marked for tiles or not; `gated` has a gate and an up
    projection.
    """
    project(panels, 0, count, table, len(places), groups, projected)
    activate(gated, 0, inner, table, len(places), groups, inner, hidden, 0)
    factors = np.ones(len(places), np.float32)
    add_projected(panels, 0, count, table, places, factors, groups, zeros, residual)
    amx.release()


def panels_of(matrices, bits):
    packed = pack(matrices, bits)
    memory = aligned(packed.nbytes)
    memory[:] = packed.reshape(-1)
    return memory, len(packed)


def outputs_of(mark, rows, width, outputs, bits, holes):
    """Return the products of random matrices, by tiles (`mark`) or by vectors; with `holes`, other
    rows lie between the rows.
    """
    generator = torch.Generator().manual_seed(rows)
    groups = -(-width // GROUP)
    x = torch.zeros(rows, groups * GROUP)
    x[:, :width] = torch.randn(rows, width, generator=generator)
    weights = [torch.randn(outputs, width, generator=generator) for _ in range(3)]
    matrices = [quantize(weight, bits=bits) for weight in weights]
    single, count = panels_of(matrices[:1], bits)
    gated, both = panels_of(matrices[1:], bits)
    mark += FOUR_BITS if bits == 4 else 0
    memory = aligned((2 * rows + 1) * row_bytes(groups))
    distance = 2 if holes else 1
    table = memory.ctypes.data + row_bytes(groups) * distance * np.arange(rows)
    round_rows(x.numpy(), table, groups)
    inner = both // (GROUP // 16)
    hidden = aligned(rows * row_bytes(inner))
    projected = np.zeros((rows, outputs), np.float32)
    residual = np.ones((rows, outputs), np.float32)
    run(
        single.ctypes.data + mark,
        count,
        table.ctypes.data,
        groups,
        projected,
        gated.ctypes.data + mark,
        hidden.ctypes.data,
        inner,
        residual,
        np.arange(rows),
        np.zeros(count * COLUMNS, np.float32),
    )
    return projected, residual, hidden


@given(
    rows=st.integers(FEWEST_TILE_ROWS, 600),
    width=st.integers(1, 300),
    outputs=st.integers(1, 130),
    bits=st.sampled_from([8, 4]),
    holes=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_tiles_give_the_bits_of_vectors(rows, width, outputs, bits, holes):
    tiles = outputs_of(BY_TILES, rows, width, outputs, bits, holes)
    for one, other in zip(tiles, outputs_of(0, rows, width, outputs, bits, holes), strict=True):
        assert np.array_equal(one, other)
        assert one.any()
