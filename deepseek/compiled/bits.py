"""Sets of a page's tokens as the 64 bits of an integer, and prefetching."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deepseek.compiled.abi import PAGE
from deepseek.kernels.numba.emit import SHORT, Emit


@intrinsic
def matches(_typing: Any, _codes: Any, _code: Any) -> Any:
    """Return which of the page's 64 codes, uint16 at an address, equal `code`."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        codes = emit.load(ir.VectorType(SHORT, PAGE), args[0], 2)
        wanted = emit.splat(builder.trunc(args[1], SHORT), PAGE)
        return builder.bitcast(builder.icmp_unsigned("==", codes, wanted), ir.IntType(64))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def count_bits(_typing: Any, _bits: Any) -> Any:
    """Return how many bits are set."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.int64), generate


@intrinsic
def lowest_bit(_typing: Any, _bits: Any) -> Any:
    """Return the index of the lowest bit that is set; at least one must be."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.int64(types.int64), generate


@intrinsic
def prefetch(_typing: Any, _address: Any) -> Any:
    """Prefetch the cache line at an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        Emit(context, builder).prefetch(args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate
