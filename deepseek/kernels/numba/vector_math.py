"""Functions of 16 numbers at once, written in LLVM IR (see `kernels/numba/emit.py`)."""

from typing import Any

from llvmlite import ir

from deepseek.kernels.int8_layout import LANES
from deepseek.kernels.numba.emit import FLOATS, SHORT, WORDS, Emit

LIMIT = 87.0  # the exponentials of -LIMIT and LIMIT are normal numbers
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


def floats(value: float) -> Any:
    """Return a vector of 16 copies of a number."""
    return ir.Constant(FLOATS, [value] * LANES)


def _words(value: int) -> Any:
    return ir.Constant(WORDS, [value] * LANES)


def larger(emit: Emit, a: Any, b: Any) -> Any:
    """Return the elementwise maximum; the element of `b` where either is NaN."""
    return emit.builder.select(emit.builder.fcmp_ordered(">", a, b), a, b)


def exp(emit: Emit, x: Any) -> Any:
    """Return the exponentials of x, accurate to 2e-7; x is clamped to -87..87."""
    x = larger(emit, x, floats(-LIMIT))
    high = floats(LIMIT)
    x = emit.builder.select(emit.builder.fcmp_ordered("<", x, high), x, high)
    n = emit.call("llvm.floor.v16f32", FLOATS, emit.fma(x, floats(LOG2_E), floats(0.5)))
    for part in LN_2:
        x = emit.fma(n, floats(-part), x)
    result = floats(EXP[0])
    for coefficient in EXP[1:]:
        result = emit.fma(result, x, floats(coefficient))
    exponent = emit.builder.add(emit.builder.fptosi(n, WORDS), _words(127))
    power = emit.builder.shl(exponent, _words(23))
    return emit.builder.fmul(result, emit.builder.bitcast(power, FLOATS))


def tanh(emit: Emit, x: Any) -> Any:
    """Return the hyperbolic tangents of x, with absolute errors up to 2e-7."""
    one = floats(1.0)
    double = exp(emit, emit.builder.fadd(x, x))
    half = emit.builder.fdiv(one, emit.builder.fadd(one, double))
    return emit.fma(half, floats(-2.0), one)


def sigmoid(emit: Emit, x: Any) -> Any:
    """Return the logistic function of x, accurate to 2e-7."""
    one = floats(1.0)
    return emit.builder.fdiv(one, emit.builder.fadd(one, exp(emit, emit.builder.fneg(x))))


def narrow(emit: Emit, values: Any) -> Any:
    """Return the bits of the nearest bf16 numbers (ties to even)."""
    builder = emit.builder
    bits = builder.bitcast(values, WORDS)
    odd = builder.and_(builder.lshr(bits, _words(16)), _words(1))
    rounded = builder.add(bits, builder.add(odd, _words(0x7FFF)))
    return builder.trunc(builder.lshr(rounded, _words(16)), ir.VectorType(SHORT, LANES))
