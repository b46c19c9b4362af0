"""Building blocks of kernels: threads and their shares, bf16 conversion, addresses, the
exponential.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.numba import openmp
from deepseek.kernels.numba.subroutine import subroutine

# The runtime's symbols must be known before a kernel that uses them is compiled or loaded.
openmp.runtime()
_thread = openmp.external("omp_get_thread_num", types.int32())
_threads = openmp.external("omp_get_num_threads", types.int32())
barrier = openmp.external("GOMP_barrier", types.void())


@intrinsic
def pointer(_typing: Any, _address: Any) -> Any:
    """Return an int64 address as a pointer."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def widen(_typing: Any, value: Any) -> Any:
    """Return a weight as fp32; a uint16 holds the bits of a bf16 number."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if value != types.uint16:
            return args[0]
        bits = builder.zext(args[0], context.get_value_type(types.uint32))
        return builder.bitcast(
            builder.shl(bits, bits.type(16)), context.get_value_type(types.float32)
        )

    return types.float32(value), generate


@intrinsic
def narrow(_typing: Any, _value: Any, like: Any) -> Any:
    """Convert an fp32 number to the type of `like`: fp32, or the bits of the nearest bf16 number
    (ties to even).
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if like != types.uint16:
            return args[0]
        bits = builder.bitcast(args[0], context.get_value_type(types.uint32))
        odd = builder.and_(builder.lshr(bits, bits.type(16)), bits.type(1))
        rounded = builder.add(bits, builder.add(odd, bits.type(0x7FFF)))
        return builder.trunc(
            builder.lshr(rounded, bits.type(16)), context.get_value_type(types.uint16)
        )

    return like(types.float32, like), generate


@intrinsic
def _power_of_two(_typing: Any, _exponent: Any) -> Any:
    """Return 2 to the power of an int32, as fp32."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        bits = builder.shl(builder.add(args[0], args[0].type(127)), args[0].type(23))
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@subroutine(fastmath=True, inline="always")
def exp(x):  # type: ignore[no-untyped-def]
    """Return the exponential of x, accurate to 2e-7; x is clamped to -87..87.

    This is Cephes' expf, which is vectorised in loops, unlike libm's.
    """
    t = min(max(x, np.float32(-87.0)), np.float32(87.0))
    n = np.floor(t * np.float32(1.4426950408889634) + np.float32(0.5))
    r = t - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1)) * _power_of_two(np.int32(n))


@subroutine(fastmath=True, inline="always")
def sigmoid(x):  # type: ignore[no-untyped-def]
    """Return the logistic function of x, accurate to 2e-7."""
    return np.float32(1) / (np.float32(1) + exp(-x))


@subroutine
def thread_number():  # type: ignore[no-untyped-def]
    """Return the number of the calling thread."""
    return np.int64(_thread())


@subroutine
def thread_count():  # type: ignore[no-untyped-def]
    """Return the number of threads in the parallel region."""
    return np.int64(_threads())


@subroutine
def share(columns):  # type: ignore[no-untyped-def]
    """Return this thread's share of `columns` columns: the first, and the one past the last."""
    thread = thread_number()
    threads = thread_count()
    return columns * thread // threads, columns * (thread + 1) // threads
