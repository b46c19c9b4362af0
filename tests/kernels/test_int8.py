"""8-bit matrices: quantisation is close, and packed products equal the slow ones for any batch of
rows.
"""

import numpy as np
import pytest
import torch
from numba import njit

from deepseek.compiled.abi import FOUR_BITS
from deepseek.compiled.products import multiply
from deepseek.compiled.rows import round_group, row_bytes
from deepseek.kernels.int8 import (
    LEVELS,
    SEARCHED,
    Compensation,
    from_nibbles,
    pack,
    packed_bytes,
    product_reference,
    quantize,
    to_nibbles,
)
from deepseek.kernels.int8_layout import COLUMNS, GROUP
from deepseek.kernels.numba.buffers import aligned


@njit
def round_row(x, row, groups):
    for group in range(groups):
        round_group(x + 4 * GROUP * group, row, group, groups)


def product(x_ND, matrix):
    """Return `x W^T`, computed by the kernel."""
    packed, groups = pack([matrix], matrix.bits), matrix.scales.shape[1]
    panels, stride = aligned(packed.nbytes), row_bytes(groups)
    panels[:] = packed.reshape(-1)
    x = torch.nn.functional.pad(x_ND, (0, groups * GROUP - x_ND.shape[1])).contiguous()
    rows = aligned(len(x) * stride)
    table = np.array([rows.ctypes.data + i * stride for i in range(len(x))])
    for i in range(len(x)):
        round_row(x[i].data_ptr(), table[i], groups)
    out = np.zeros((len(packed), len(x), COLUMNS), np.float32)
    address = panels.ctypes.data + (FOUR_BITS if matrix.bits == 4 else 0)
    for p in range(len(packed)):
        multiply(address, p, table.ctypes.data, len(x), groups, out[p].ctypes.data)
    return torch.from_numpy(
        out.transpose(1, 0, 2).reshape(len(x), -1)[:, : len(matrix.values)].copy()
    )


def problem(rows, width, outputs):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (
        torch.randn(rows, width, generator=generator),
        torch.randn(outputs, width, generator=generator),
    )
    x[:, 3] *= 40  # an outlier channel, as in language models
    return x, weight


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 64, 32), (15, 130, 70), (3, 576, 33)])
def test_the_kernel_is_the_reference(rows, width, outputs, bits):
    x, weight = problem(rows, width, outputs)
    matrix = quantize(weight, bits=bits)
    torch.testing.assert_close(
        product(x, matrix), product_reference(x, matrix), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    ("bits", "weight_error", "product_error", "size"), [(8, 0.01, 0.02, 0.27), (4, 0.1, 0.12, 0.14)]
)
def test_rounding_costs_little_in_spite_of_a_large_channel(bits, weight_error, product_error, size):
    x, weight = problem(16, 192, 64)
    matrix, exact = quantize(weight, bits=bits), x @ weight.T
    assert (matrix.float() - weight).norm() / weight.norm() < weight_error
    assert (product_reference(x, matrix) - exact).norm() / exact.norm() < product_error
    assert matrix.nbytes <= size * 4 * weight.numel()
    assert matrix.values.min() >= LEVELS[bits][0] and matrix.values.max() <= LEVELS[bits][1]


def test_nibbles_hold_two_values_each():
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 8)
    nibbles = to_nibbles(values)
    assert nibbles.dtype == torch.uint8 and nibbles.shape == (3, 64)
    assert torch.equal(from_nibbles(nibbles), values)


@pytest.mark.parametrize("bits", [8, 4])
def test_panels_have_the_size_that_was_reckoned(bits):
    for outputs in ([33], [70, 70]):
        matrices = [quantize(problem(1, 130, count)[1], bits=bits) for count in outputs]
        assert pack(matrices, bits).nbytes == packed_bytes(outputs, 130, bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_those_beside_it(bits):
    x, weight = problem(15, 128, 64)
    matrix = quantize(weight, bits=bits)
    alone = torch.cat([product(x[i : i + 1], matrix) for i in range(15)])
    assert torch.equal(product(x, matrix), alone)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_rounded_row_does_not_depend_on_those_beside_it(bits):
    _, weight = problem(1, 3 * GROUP, 1000)  # more groups than one pass of the scale search
    assert weight.numel() > SEARCHED * GROUP
    matrix = quantize(weight, bits=bits)
    alone = [quantize(weight[i : i + 1], bits=bits) for i in (0, 341, 342, 999)]
    for i, row in zip((0, 341, 342, 999), alone, strict=True):
        assert torch.equal(matrix.values[i : i + 1], row.values)
        assert torch.equal(matrix.scales[i : i + 1], row.scales)


def test_rounding_a_rounded_matrix_again_keeps_its_values():
    _, weight = problem(1, 128, 64)
    once = quantize(weight)
    assert (quantize(once.float()).float() - once.float()).abs().max() < 0.02 * weight.abs().max()


def test_errors_are_made_up_for_where_inputs_go_together():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(150, 150, generator=generator) * torch.logspace(0, -2, 150)[:, None]
    x, weight = (
        torch.randn(2000, 150, generator=generator) @ mixing,
        torch.randn(40, 150, generator=generator),
    )
    nearest, suited = quantize(weight), quantize(weight, Compensation.of(x[:1000].T @ x[:1000]))
    assert torch.equal(suited.scales, nearest.scales)
    errors = [(x[1000:] @ (matrix.float() - weight).T).norm() for matrix in (nearest, suited)]
    assert errors[1] < 0.5 * errors[0]
    assert (suited.float() - weight).norm() < 0.05 * weight.norm()


def test_inputs_that_say_nothing_round_to_the_nearest():
    weight = problem(1, 128, 40)[1]
    for gram in (torch.eye(128), torch.zeros(128, 128)):
        assert torch.equal(quantize(weight, Compensation.of(gram)).values, quantize(weight).values)
