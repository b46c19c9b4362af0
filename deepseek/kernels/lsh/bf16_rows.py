"""Operations on rows of numbers, given by address, in vectors of 16.

Numba counts references for every slice of an array. With short rows, that takes a sixth of the time
of attention. Addresses have no reference counts.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.int8_layout import LANES
from deepseek.kernels.numba.emit import FLOAT, FLOATS, SHORT, WORD, WORDS, Emit, loop
from deepseek.kernels.numba.vector_math import LIMIT, exp, floats, narrow

SHORTS = ir.VectorType(SHORT, LANES)
LOWEST = -1e30
_WHOLE = types.int64
_REAL = types.float32


class _Rows(Emit):
    """Emits operations on rows."""

    def each(self, count: Any, body: Callable[[Any], None]) -> None:
        """Emit `body` for the index of every vector of `count` numbers, at least for the first."""

        def one(index: Any, _carried: list[Any]) -> list[Any]:
            body(self.builder.mul(index, index.type(LANES)))
            return []

        loop(self.builder, self.vectors(count), [], one)

    def vectors(self, count: Any) -> Any:
        """Return the number of vectors that hold `count` numbers."""
        return self.builder.ashr(self.builder.add(count, count.type(LANES - 1)), count.type(4))

    def numbers(self, row: Any, index: Any) -> Any:
        """Return the fp32 numbers from `index` on."""
        return self.load(FLOATS, self.place(row, index, 4), 4)

    def place(self, row: Any, index: Any, size: int) -> Any:
        """Return the address of number `index`, of `size` bytes."""
        return self.address(row, self.builder.mul(index, index.type(size)))

    def inside(self, index: Any, count: Any, numbers: Any, rest: float) -> Any:
        """Replace the numbers from `count` on by `rest`."""
        left = self.splat(self.builder.trunc(self.builder.sub(count, index), WORD))
        lanes = ir.Constant(WORDS, list(range(LANES)))
        return self.builder.select(
            self.builder.icmp_signed("<", lanes, left), numbers, floats(rest)
        )

    def weights(self, exponents: Any) -> Any:
        """Return the exponentials of numbers up to 0, and 0 for those at or below -`LIMIT`."""
        low = self.builder.fcmp_ordered("<=", exponents, floats(-LIMIT))
        return self.builder.select(low, floats(0.0), exp(self, exponents))

    def reduce(self, name: str, *args: Any) -> Any:
        """Return the maximum or the sum of the lanes; the sum is a tree reduction."""
        kind = ir.FunctionType(FLOAT, [arg.type for arg in args])
        function = self.builder.module.declare_intrinsic(
            f"llvm.vector.reduce.{name}.v16f32", (), kind
        )
        return self.builder.call(function, args, fastmath=("reassoc", "nnan", "nsz"))


def _operation(signature: Any, emit_body: Callable[..., Any]) -> Any:
    """Return the function for kernels whose instructions `emit_body` emits."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        result = emit_body(_Rows(context, builder), *args)
        return context.get_dummy_value() if result is None else result

    return signature, generate


@intrinsic
def copy(_typing: Any, _source: Any, _target: Any, _count: Any) -> Any:
    """Copy `count` bf16 numbers, rounded up to a multiple of 16."""

    def body(emit: _Rows, source: Any, target: Any, count: Any) -> None:
        def one(index: Any) -> None:
            numbers = emit.load(SHORTS, emit.place(source, index, 2), 2)
            emit.store(numbers, emit.place(target, index, 2), 2)

        emit.each(count, one)

    return _operation(types.void(*[_WHOLE] * 3), body)


@intrinsic
def clear(_typing: Any, _target: Any, _count: Any) -> Any:
    """Set `count` bf16 numbers, rounded up to a multiple of 16, to zero."""

    def body(emit: _Rows, target: Any, count: Any) -> None:
        zeros = ir.Constant(SHORTS, [0] * LANES)
        emit.each(count, lambda index: emit.store(zeros, emit.place(target, index, 2), 2))

    return _operation(types.void(*[_WHOLE] * 2), body)


@intrinsic
def accumulate(_typing: Any, _target: Any, _factor: Any, _source: Any, _count: Any) -> Any:
    """Set `count` fp32 numbers of `target`, rounded up to a multiple of 16, to `factor` times
    themselves plus `source`.
    """

    def body(emit: _Rows, target: Any, factor: Any, source: Any, count: Any) -> None:
        factors = emit.splat(factor)

        def one(index: Any) -> None:
            total = emit.fma(emit.numbers(target, index), factors, emit.numbers(source, index))
            emit.store(total, emit.place(target, index, 4), 4)

        emit.each(count, one)

    return _operation(types.void(_WHOLE, _REAL, _WHOLE, _WHOLE), body)


@intrinsic
def divide(_typing: Any, _source: Any, _divisor: Any, _target: Any, _count: Any) -> Any:
    """Store `count` fp32 numbers, divided by `divisor`, as bf16 numbers, and set them to zero;
    `count` is a multiple of 16.
    """

    def body(emit: _Rows, source: Any, divisor: Any, target: Any, count: Any) -> None:
        divisors = emit.splat(divisor)

        def one(index: Any) -> None:
            quotient = emit.builder.fdiv(emit.numbers(source, index), divisors)
            emit.store(narrow(emit, quotient), emit.place(target, index, 2), 2)
            emit.store(floats(0.0), emit.place(source, index, 4), 4)

        emit.each(count, one)

    return _operation(types.void(_WHOLE, _REAL, _WHOLE, _WHOLE), body)


@intrinsic
def scale_row(_typing: Any, _scores: Any, _count: Any, _factor: Any) -> Any:
    """Multiply `count` fp32 numbers, rounded up to a multiple of 16, by `factor`."""

    def body(emit: _Rows, scores: Any, count: Any, factor: Any) -> None:
        factors = emit.splat(factor)

        def one(index: Any) -> None:
            scaled = emit.builder.fmul(emit.numbers(scores, index), factors)
            emit.store(scaled, emit.place(scores, index, 4), 4)

        emit.each(count, one)

    return _operation(types.void(_WHOLE, _WHOLE, _REAL), body)


@intrinsic
def highest_score(_typing: Any, _scores: Any, _count: Any, _least: Any) -> Any:
    """Return the highest of `count` scores and `least`."""

    def body(emit: _Rows, scores: Any, count: Any, least: Any) -> Any:
        def one(number: Any, tops: list[Any]) -> list[Any]:
            index = emit.builder.mul(number, number.type(LANES))
            row = emit.inside(index, count, emit.numbers(scores, index), LOWEST)
            higher = emit.builder.fcmp_ordered(">", row, tops[0])
            return [emit.builder.select(higher, row, tops[0])]

        tops = loop(emit.builder, emit.vectors(count), [emit.splat(least)], one)
        return emit.reduce("fmax", *tops)

    return _operation(_REAL(_WHOLE, _WHOLE, _REAL), body)


@intrinsic
def soften(_typing: Any, _scores: Any, _count: Any, _top: Any, _weights: Any) -> Any:
    """Store the weights exp(score - top) as bf16 numbers, zeros up to a multiple of 16; return
    their sum before rounding.
    """

    def body(emit: _Rows, scores: Any, count: Any, top: Any, weights: Any) -> Any:
        tops = emit.splat(top)

        def one(number: Any, totals: list[Any]) -> list[Any]:
            index = emit.builder.mul(number, number.type(LANES))
            row = emit.inside(index, count, emit.numbers(scores, index), 2 * LOWEST)
            weight = emit.weights(emit.builder.fsub(row, tops))
            emit.store(narrow(emit, weight), emit.place(weights, index, 2), 2)
            return [emit.builder.fadd(totals[0], weight)]

        totals = loop(emit.builder, emit.vectors(count), [floats(0.0)], one)
        return emit.reduce("fadd", FLOAT(0.0), *totals)

    return _operation(_REAL(_WHOLE, _WHOLE, _REAL, _WHOLE), body)


@intrinsic
def through_softmax(
    _typing: Any,
    _scores: Any,
    _changes: Any,
    _count: Any,
    _lse: Any,
    _dot: Any,
    _scale: Any,
    _weights: Any,
    _target: Any,
) -> Any:
    """Set `count` numbers, zeros up to a multiple of 16: `weights` to exp(score - lse), `changes`
    from the gradients of the weights to those of the scores, and `target` to `scale` times these.
    """

    def body(
        emit: _Rows,
        scores: Any,
        changes: Any,
        count: Any,
        lse: Any,
        dot: Any,
        scale: Any,
        weights: Any,
        target: Any,
    ) -> None:
        builder = emit.builder
        lses, dots, scales = (emit.splat(number) for number in (lse, dot, scale))

        def one(index: Any) -> None:
            row = emit.inside(index, count, emit.numbers(scores, index), 2 * LOWEST)
            weight = emit.weights(builder.fsub(row, lses))
            place = emit.place(changes, index, 4)
            grads = builder.fsub(emit.load(FLOATS, place, 4), dots)
            change = builder.fmul(weight, emit.inside(index, count, grads, 0.0))
            emit.store(change, place, 4)
            emit.store(narrow(emit, weight), emit.place(weights, index, 2), 2)
            scaled = builder.fmul(change, scales)
            emit.store(narrow(emit, scaled), emit.place(target, index, 2), 2)

        emit.each(count, one)

    return _operation(types.void(*[_WHOLE] * 3, *[_REAL] * 3, *[_WHOLE] * 2), body)
