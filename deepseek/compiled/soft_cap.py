"""Caps of scores and logits (Gemma 2, arXiv:2408.00118, section 2)."""

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.int8_layout import LANES
from deepseek.kernels.numba.emit import FLOATS, Emit, loop
from deepseek.kernels.numba.subroutine import subroutine
from deepseek.kernels.numba.vector_math import floats, tanh


@intrinsic
def cap_values(_typing: Any, _values: Any, _count: Any, _cap: Any) -> Any:
    """Replace `count` fp32 numbers z at an address by cap * tanh(z / cap).

    `count` is a positive multiple of 16.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        values, count, cap = args
        caps = emit.splat(cap)
        shares = builder.fdiv(floats(1.0), caps)

        def one(i: Any, carried: list[Any]) -> list[Any]:
            at = emit.address(values, builder.mul(i, i.type(4 * LANES)))
            capped = tanh(emit, builder.fmul(emit.load(FLOATS, at, 4), shares))
            emit.store(builder.fmul(capped, caps), at, 4)
            return carried

        loop(builder, builder.udiv(count, count.type(LANES)), [], one)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@subroutine(error_model="numpy")
def cap_columns(logits, first, last, cap):  # type: ignore[no-untyped-def]
    """Cap columns `first` to `last - 1` of logits `[N, V]`; `last` may exceed V."""
    last = min(last, logits.shape[1])
    whole = (last - first) // LANES * LANES
    rest = np.zeros(LANES, np.float32)
    for r in range(len(logits)):
        row = logits[r, first:last]
        if whole > 0:
            cap_values(row.ctypes.data, whole, cap)
        remaining = row[whole:]
        if len(remaining):
            rest[: len(remaining)] = remaining
            cap_values(rest.ctypes.data, LANES, cap)
            remaining[:] = rest[: len(remaining)]
