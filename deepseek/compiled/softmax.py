"""The softmax of attention scores, written in LLVM IR (see `kernels/numba/emit.py`).

Numba would compile the loops to one number at a time.
"""

import math
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.int8_layout import LANES
from deepseek.kernels.numba.emit import FLOAT, FLOATS, SHORT, WORD, WORDS, Emit, loop

LOWEST = -87.0  # its exponential is near the smallest normal number
LOG2_E = 1.4426950408889634
LN_2 = (0.693359375, -2.12194440e-4)
EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
    1.0,
    1.0,
)
"""Coefficients of Cephes' expf, as in `kernels/numba/primitives.py`."""


def _floats(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)


def _words(value: int) -> Any:
    return ir.Constant(WORDS, [value] * LANES)


def _larger(emit: Emit, a: Any, b: Any) -> Any:
    return emit.builder.select(emit.builder.fcmp_ordered(">", a, b), a, b)


def _exp(emit: Emit, x: Any) -> Any:
    """Return the exponentials of numbers up to 0, accurate to 2e-7."""
    x = _larger(emit, x, _floats(LOWEST))
    n = emit.call("llvm.floor.v16f32", FLOATS, emit.fma(x, _floats(LOG2_E), _floats(0.5)))
    for part in LN_2:
        x = emit.fma(n, _floats(-part), x)
    result = _floats(EXP[0])
    for coefficient in EXP[1:]:
        result = emit.fma(result, x, _floats(coefficient))
    exponent = emit.builder.add(emit.builder.fptosi(n, WORDS), _words(127))
    power = emit.builder.shl(exponent, _words(23))
    return emit.builder.fmul(result, emit.builder.bitcast(power, FLOATS))


def _narrow(emit: Emit, values: Any) -> Any:
    """Return the bits of the nearest bf16 numbers (ties to even)."""
    builder = emit.builder
    bits = builder.bitcast(values, WORDS)
    odd = builder.and_(builder.lshr(bits, _words(16)), _words(1))
    rounded = builder.add(bits, builder.add(odd, _words(0x7FFF)))
    return builder.trunc(builder.lshr(rounded, _words(16)), ir.VectorType(SHORT, LANES))


def _reduce(emit: Emit, values: Any, join: Any) -> Any:
    """Return the result of joining all lanes, always in the same order."""
    step = LANES // 2
    while step:
        values = join(values, emit.shuffle(values, [i ^ step for i in range(LANES)]))
        step //= 2
    return values


@intrinsic
def softmax(_typing: Any, _scores: Any, _probs: Any, _first: Any, _stop: Any) -> Any:
    """Set probabilities `first` to `stop - 1` to the exponentials of the scores minus the largest
    one, as bf16, and those beside them in the same 16 to zero; return the reciprocal of their sum.

    `scores` and `probs` are the addresses of fp32 and of bf16 numbers. The result depends on the
    place of a score in its 16, but not on how many come before `first`.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        scores, probs, first, stop = args
        whole = first.type
        begin = builder.and_(first, whole(-LANES))
        count = builder.udiv(builder.add(builder.sub(stop, begin), whole(LANES - 1)), whole(LANES))
        lanes = ir.Constant(WORDS, list(range(LANES)))

        def place(i: Any) -> Any:
            return builder.add(begin, builder.mul(i, whole(LANES)))

        def inside(i: Any) -> Any:
            index = builder.add(emit.splat(builder.trunc(place(i), WORD)), lanes)
            low = builder.icmp_signed(">=", index, emit.splat(builder.trunc(first, WORD)))
            high = builder.icmp_signed("<", index, emit.splat(builder.trunc(stop, WORD)))
            return builder.and_(low, high)

        def load(i: Any) -> Any:
            return emit.load(FLOATS, emit.address(scores, builder.mul(place(i), whole(4))), 64)

        def one_largest(i: Any, carried: list[Any]) -> list[Any]:
            seen = builder.select(inside(i), load(i), _floats(-math.inf))
            return [_larger(emit, carried[0], seen)]

        largest = loop(builder, count, [_floats(-math.inf)], one_largest)[0]
        largest = _reduce(emit, largest, partial(_larger, emit))

        def one_exp(i: Any, carried: list[Any]) -> list[Any]:
            value = _exp(emit, builder.fsub(load(i), largest))
            value = builder.select(inside(i), value, _floats(0.0))
            at = emit.address(probs, builder.mul(place(i), whole(2)))
            emit.store(_narrow(emit, value), at, 32)
            return [builder.fadd(carried[0], value)]

        total = loop(builder, count, [_floats(0.0)], one_exp)[0]
        total = _reduce(emit, total, builder.fadd)
        return builder.fdiv(FLOAT(1.0), builder.extract_element(total, WORD(0)))

    whole = types.int64
    return types.float32(whole, whole, whole, whole), generate
