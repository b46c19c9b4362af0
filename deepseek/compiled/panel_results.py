"""Activations and sums of the products of a panel and rows, written in LLVM IR (see
`kernels/numba/emit.py`).

In Numba, slicing 16 or 32 numbers costs more than the arithmetic on them.
"""

from typing import Any

from numba import types
from numba.extending import intrinsic

from deepseek.kernels.int8_layout import COLUMNS, GROUP, LANES
from deepseek.kernels.numba.emit import FLOAT, FLOATS, Emit, loop
from deepseek.kernels.numba.vector_math import floats, sigmoid


def _silu(emit: Emit, x: Any) -> Any:
    return emit.builder.fmul(x, sigmoid(emit, x))


def _gelu(emit: Emit, x: Any) -> Any:
    """Return GELU in its tanh form."""
    builder = emit.builder
    # 0.5 (1 + tanh(z)) is the logistic function of 2 z.
    cube = builder.fmul(builder.fmul(x, x), x)
    z = emit.fma(floats(0.044715), cube, x)
    return builder.fmul(x, sigmoid(emit, builder.fmul(floats(1.5957691216), z)))


def _gate_rows(activation: Any) -> Any:
    """Return the intrinsic that computes 16 hidden values of each row."""

    @intrinsic
    def gate_rows(_typing: Any, _product: Any, _rows: Any, _hidden: Any) -> Any:
        """Set 16 hidden values of each row to the activation of the gates times the ups.

        The product is fp32 `[rows, 2, 16]`. `hidden` is the address of one quarter of the columns
        of fp32 `[rows, 64]`.
        """

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            emit = Emit(context, builder)
            product, rows, hidden = args

            def one_row(r: Any, _carried: list[Any]) -> list[Any]:
                source = emit.address(product, builder.mul(r, r.type(COLUMNS * 4)))
                gates = emit.load(FLOATS, source, 4)
                ups = emit.load(FLOATS, emit.address(source, LANES * 4), 4)
                value = builder.fmul(activation(emit, gates), ups)
                emit.store(value, emit.address(hidden, builder.mul(r, r.type(GROUP * 4))), 4)
                return []

            loop(builder, rows, [], one_row)
            return context.get_dummy_value()

        whole = types.int64
        return types.void(whole, whole, whole), generate

    return gate_rows


silu_rows = _gate_rows(_silu)
gelu_rows = _gate_rows(_gelu)


@intrinsic
def add_rows(
    _typing: Any,
    _product: Any,
    _rows: Any,
    _places: Any,
    _factors: Any,
    _bias: Any,
    _target: Any,
    _stride: Any,
) -> Any:
    """Add `factors[i]` times (row i of the product + bias) to row `places[i]` of the target.

    All are addresses: product fp32 `[rows, 32]`, places int64, factors fp32, bias fp32 `[32]`, and
    32 columns of a target whose rows lie `stride` bytes apart.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        product, rows, places, factors, bias, target, stride = args
        halves = range(0, COLUMNS * 4, LANES * 4)
        biases = [emit.load(FLOATS, emit.address(bias, half), 4) for half in halves]

        def one_row(r: Any, _carried: list[Any]) -> list[Any]:
            source = emit.address(product, builder.mul(r, r.type(COLUMNS * 4)))
            place = emit.load(r.type, emit.address(places, builder.mul(r, r.type(8))), 8)
            row = emit.address(target, builder.mul(place, stride))
            factor = emit.load(FLOAT, emit.address(factors, builder.mul(r, r.type(4))), 4)
            for half, added in zip(halves, biases, strict=True):
                at = emit.address(row, half)
                value = builder.fadd(emit.load(FLOATS, emit.address(source, half), 4), added)
                value = builder.fmul(emit.splat(factor), value)
                emit.store(builder.fadd(emit.load(FLOATS, at, 4), value), at, 4)
            return []

        loop(builder, rows, [], one_row)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(whole, whole, whole, whole, whole, whole, whole), generate


@intrinsic
def copy_rows(_typing: Any, _product: Any, _rows: Any, _target: Any, _stride: Any) -> Any:
    """Copy a product, fp32 `[rows, 32]`, to 32 columns of rows that lie `stride` bytes apart."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        product, rows, target, stride = args

        def one_row(r: Any, _carried: list[Any]) -> list[Any]:
            source = emit.address(product, builder.mul(r, r.type(COLUMNS * 4)))
            row = emit.address(target, builder.mul(r, stride))
            for half in range(0, COLUMNS * 4, LANES * 4):
                value = emit.load(FLOATS, emit.address(source, half), 4)
                emit.store(value, emit.address(row, half), 4)
            return []

        loop(builder, rows, [], one_row)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(whole, whole, whole, whole), generate
