"""The softmax of attention scores, written in LLVM IR (see `kernels/numba/emit.py`).

Numba would not vectorise the loops.
"""

import math
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.int8_layout import LANES
from deepseek.kernels.numba.emit import FLOAT, FLOATS, WORD, WORDS, Emit, loop
from deepseek.kernels.numba.vector_math import exp, floats, larger, narrow


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
    one, as bf16, and the others in the same groups of 16 to zero; return the reciprocal of their
    sum.

    `scores` and `probs` are the addresses of fp32 and of bf16 numbers. The result depends on the
    place of a score in its group of 16, but not on how many come before `first`.
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
            seen = builder.select(inside(i), load(i), floats(-math.inf))
            return [larger(emit, carried[0], seen)]

        largest = loop(builder, count, [floats(-math.inf)], one_largest)[0]
        largest = _reduce(emit, largest, partial(larger, emit))

        def one_exp(i: Any, carried: list[Any]) -> list[Any]:
            value = exp(emit, builder.fsub(load(i), largest))
            value = builder.select(inside(i), value, floats(0.0))
            at = emit.address(probs, builder.mul(place(i), whole(2)))
            emit.store(narrow(emit, value), at, 32)
            return [builder.fadd(carried[0], value)]

        total = loop(builder, count, [floats(0.0)], one_exp)[0]
        total = _reduce(emit, total, builder.fadd)
        return builder.fdiv(FLOAT(1.0), builder.extract_element(total, WORD(0)))

    whole = types.int64
    return types.float32(whole, whole, whole, whole), generate
