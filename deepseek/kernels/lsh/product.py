"""Small matrix products in registers: tiles of 8 rows by 16 columns of fp32 with vectors of 16
numbers, of 4 rows otherwise.

A BLAS chooses its order of summation by the sizes of the matrices, so a row's result would depend
on the number of other rows: later tokens would change the last bits of earlier ones. Here every
element is summed from the first term to the last, whatever the other rows. At these sizes no
packing is needed.
"""

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.numba.subroutine import subroutine

LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
COLUMNS = 16
ROWS = 8 * LANES // COLUMNS  # eight independent sums keep both FMA units busy
FLOAT = ir.FloatType()
INT = ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)


def _load(builder: Any, address: Any, offset: Any, kind: Any = VECTOR) -> Any:
    """Load a value of type `kind` at `offset` floats past `address`."""
    place = builder.add(address, builder.mul(offset, INT(4)))
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=4, typ=kind)


def _splat(builder: Any, number: Any) -> Any:
    """Return the vector whose lanes all hold `number`."""
    single = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), number, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(single, ir.Constant(VECTOR, ir.Undefined), zeros)


def _step(
    builder: Any, k: Any, sums: list[Any], a: Any, row_a: Any, step_a: Any, b: Any, row_b: Any
) -> list[Any]:
    """Add the products of column k of a and row k of b to the sums."""
    start = builder.mul(k, row_b)
    rights = [
        _load(builder, b, builder.add(start, INT(LANES * part))) for part in range(COLUMNS // LANES)
    ]
    added = []
    for r in range(ROWS):
        place = builder.add(builder.mul(INT(r), row_a), builder.mul(k, step_a))
        left = _splat(builder, _load(builder, a, place, FLOAT))
        added += [builder.fmul(left, right, flags=("contract",)) for right in rights]
    return [
        builder.fadd(old, new, flags=("contract",)) for old, new in zip(sums, added, strict=True)
    ]


def _tile(keep: bool) -> Callable[..., None]:
    """Return the intrinsic that sets ROWS x 16 elements of c to the product of a and b, or with
    `keep` adds it.
    """

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        a, row_a, step_a, b, row_b, c, row_c, depth = args
        places = [
            builder.add(builder.mul(INT(row), row_c), INT(column))
            for row in range(ROWS)
            for column in range(0, COLUMNS, LANES)
        ]
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        first = [_load(builder, c, place) if keep else zero for place in places]
        before = builder.block
        loop = builder.append_basic_block()
        after = builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(INT)
        sums = [builder.phi(VECTOR) for _ in places]
        last = _step(builder, k, sums, a, row_a, step_a, b, row_b)
        following = builder.add(k, INT(1))
        for phi, start, end in zip([k, *sums], [INT(0), *first], [following, *last], strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(end, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        builder.position_at_end(after)
        for place, total in zip(places, last, strict=True):
            target = builder.add(c, builder.mul(place, INT(4)))
            builder.store(total, builder.inttoptr(target, VECTOR.as_pointer()), align=4)

    def declare(
        _typing: Any, _a: Any, _ra: Any, _sa: Any, _b: Any, _rb: Any, _c: Any, _rc: Any, _depth: Any
    ) -> Any:
        return types.void(*[types.int64] * 8), generate

    return intrinsic(declare)


_set = _tile(keep=False)
_increase = _tile(keep=True)


@subroutine
def multiply(a, row_a, step_a, b, row_b, c, row_c, rows, columns, depth):  # type: ignore[no-untyped-def]
    """Set c[i, j] to the sum over k of a[i, k] b[k, j].

    a, b and c are addresses. a[i, k] is `i * row_a + k * step_a` floats from the start of a; rows
    of b and c are contiguous. `rows` is rounded up to a multiple of ROWS and `columns` to one of
    16, and the memory must be large enough for that.
    """
    for j in range(0, columns, COLUMNS):
        for i in range(0, rows, ROWS):
            _set(
                a + 4 * i * row_a,
                row_a,
                step_a,
                b + 4 * j,
                row_b,
                c + 4 * (i * row_c + j),
                row_c,
                depth,
            )


@subroutine
def multiply_add(a, row_a, step_a, b, row_b, c, row_c, rows, columns, depth):  # type: ignore[no-untyped-def]
    """Add to c the product that `multiply` computes."""
    for j in range(0, columns, COLUMNS):
        for i in range(0, rows, ROWS):
            _increase(
                a + 4 * i * row_a,
                row_a,
                step_a,
                b + 4 * j,
                row_b,
                c + 4 * (i * row_c + j),
                row_c,
                depth,
            )
