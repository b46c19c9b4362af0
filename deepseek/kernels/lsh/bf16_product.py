"""Small matrix products of bf16 numbers with sums in fp32, and the layouts that they read.

The left matrix has rows of bf16 numbers. The right one is stored in *pairs*: a 32-bit word holds
two numbers of a column, from adjacent rows. All matrices are multiples of `BLOCK` rows, columns and
terms. As in `product.py`, a row's result depends on no other row.

Tiles of AMX are used where the processor has them, and vectors otherwise.
"""

from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.int8_layout import LANES
from deepseek.kernels.numba import amx
from deepseek.kernels.numba.emit import FLOATS, SHORT, WORD, WORDS, Emit, loop
from deepseek.kernels.numba.subroutine import subroutine

BLOCK = 32
ROWS = 8  # of a product of vectors: with two vectors a row, 16 independent sums


@cache
def multiplies_fast() -> bool:
    """Whether the processor multiplies bf16 numbers faster than fp32 ones."""
    return amx.available() or binding.get_host_cpu_features().get("avx512bf16", False)


@subroutine
def _multiply_tiles(a, row_a, b, row_b, c, row_c, depth, keep):  # type: ignore[no-untyped-def]
    """Multiply one block with AMX: two by two tiles of 16 rows and 16 columns."""
    lower_a = 16 * row_a
    lower_c = c + 16 * row_c
    if keep:
        amx.load(0, c, row_c)
        amx.load(1, c + 64, row_c)
        amx.load(2, lower_c, row_c)
        amx.load(3, lower_c + 64, row_c)
    else:
        amx.zero(0)
        amx.zero(1)
        amx.zero(2)
        amx.zero(3)
    for k in range(0, depth, BLOCK):
        left = a + 2 * k
        right = b + k // 2 * row_b
        amx.load(4, left, row_a)
        amx.load(6, right, row_b)
        amx.load(7, right + 64, row_b)
        amx.load(5, left + lower_a, row_a)
        amx.add_pairs(0, 4, 6)
        amx.add_pairs(1, 4, 7)
        amx.add_pairs(2, 5, 6)
        amx.add_pairs(3, 5, 7)
    amx.store(0, c, row_c)
    amx.store(1, c + 64, row_c)
    amx.store(2, lower_c, row_c)
    amx.store(3, lower_c + 64, row_c)


@intrinsic
def _multiply_vectors(
    _typing: Any, _a: Any, _ra: Any, _b: Any, _rb: Any, _c: Any, _rc: Any, _pairs: Any, _keep: Any
) -> Any:
    """Multiply ROWS rows and 32 columns with vectors."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        a, row_a, b, row_b, c, row_c, pairs, keep = args
        lefts = [emit.address(a, builder.mul(row_a, a.type(r))) for r in range(ROWS)]
        rows_c = [emit.address(c, builder.mul(row_c, a.type(r))) for r in range(ROWS)]
        places = [emit.address(row, 64 * part) for row in rows_c for part in range(2)]
        zeros = ir.Constant(FLOATS, [0.0] * LANES)
        kept = builder.icmp_signed("!=", keep, keep.type(0))
        first = [builder.select(kept, emit.load(FLOATS, place, 4), zeros) for place in places]

        def one_pair(k: Any, sums: list[Any]) -> list[Any]:
            start = emit.address(b, builder.mul(k, row_b))
            rights = [emit.load(WORDS, emit.address(start, 64 * part), 4) for part in range(2)]
            results: list[Any] = []
            for r, left in enumerate(lefts):
                word = emit.load(WORD, emit.address(left, builder.mul(k, k.type(4))), 4)
                pair = emit.splat(word)
                results += [
                    emit.add_pairs(sums[2 * r + part], pair, right)
                    for part, right in enumerate(rights)
                ]
            return results

        for place, total in zip(places, loop(builder, pairs, first, one_pair), strict=True):
            emit.store(total, place, 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


@subroutine
def multiply(a, row_a, b, row_b, c, row_c, sizes, keep, tiled):  # type: ignore[no-untyped-def]
    """Set c[i, j] to the sum over k of a[i, k] b[k, j], or add it if `keep` is 1.

    Args:
        a, b, c: addresses.
        row_a, row_b, row_c: bytes from a row to the next; for b, from a pair of rows to the next.
        sizes: number of rows, columns and terms, each rounded up to a multiple of `BLOCK`; the
            memory must be large enough for that.
        keep: 0 or 1.
        tiled: whether the thread has AMX configured.
    """
    rows, columns, depth = sizes
    depth = whole_blocks(depth)
    for j in range(0, columns, BLOCK):
        for i in range(0, rows, BLOCK):
            left = a + i * row_a
            target = c + i * row_c + 4 * j
            if tiled:
                _multiply_tiles(left, row_a, b + 4 * j, row_b, target, row_c, depth, keep)
            else:
                for r in range(0, BLOCK, ROWS):
                    _multiply_vectors(
                        left + r * row_a,
                        row_a,
                        b + 4 * j,
                        row_b,
                        target + r * row_c,
                        row_c,
                        depth // 2,
                        keep,
                    )


@subroutine(inline="always")
def whole_blocks(count):  # type: ignore[no-untyped-def]
    """Round up to a multiple of `BLOCK`."""
    return (count + BLOCK - 1) // BLOCK * BLOCK


@intrinsic
def _pair_rows(_typing: Any, _upper: Any, _lower: Any, _target: Any) -> Any:
    """Store 16 numbers of each of two rows as 16 words."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        shorts = ir.VectorType(SHORT, LANES)
        upper, lower = (builder.zext(emit.load(shorts, row, 2), WORDS) for row in args[:2])
        shifted = builder.shl(lower, ir.Constant(WORDS, [16] * LANES))
        emit.store(builder.or_(upper, shifted), args[2], 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@subroutine
def pair(source, row, target, row_t, rows, columns):  # type: ignore[no-untyped-def]
    """Store a matrix of bf16 numbers in pairs; `rows` is rounded up to a multiple of 2 and
    `columns` to one of 16.
    """
    for i in range(0, rows, 2):
        upper = source + i * row
        for j in range(0, columns, 16):
            _pair_rows(upper + 2 * j, upper + row + 2 * j, target + i // 2 * row_t + 4 * j)
