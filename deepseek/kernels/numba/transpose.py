"""Transposes of matrices of 32-bit words, in registers."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.int8_layout import LANES
from deepseek.kernels.numba.emit import WORDS, Emit
from deepseek.kernels.numba.subroutine import subroutine


@intrinsic
def _transpose(_typing: Any, _source: Any, _row: Any, _target: Any, _row_t: Any) -> Any:
    """Transpose 16 rows of 16 words."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        source, row, target, target_row = args
        rows = [
            emit.load(WORDS, emit.address(source, builder.mul(row, row.type(i))), 4)
            for i in range(LANES)
        ]
        step = 1
        while step < LANES:
            # Exchange the off-diagonal blocks of each 2 x 2 blocks of `step` rows and columns.
            upper = [i if not i & step else LANES + i - step for i in range(LANES)]
            lower = [i + step if not i & step else LANES + i for i in range(LANES)]
            masks = [ir.Constant(WORDS, order) for order in (upper, lower)]
            for i in range(LANES):
                if not i & step:
                    pair = rows[i], rows[i + step]
                    rows[i], rows[i + step] = (
                        builder.shuffle_vector(*pair, mask) for mask in masks
                    )
            step *= 2
        for i, vector in enumerate(rows):
            emit.store(vector, emit.address(target, builder.mul(target_row, row.type(i))), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@subroutine
def transpose(source, row, target, row_t, rows, columns):  # type: ignore[no-untyped-def]
    """Transpose a matrix of 32-bit words, each size rounded up to a multiple of 16.

    Transposing rows of bf16 numbers in this way gives the pairs of the transposed matrix. `row` and
    `row_t` are the bytes from one row to the next.
    """
    for i in range(0, rows, 16):
        for j in range(0, columns, 16):
            _transpose(source + i * row + 4 * j, row, target + j * row_t + 4 * i, row_t)
