"""The innermost loops of the compiled decode step, written as vector instructions in LLVM IR.

Numba has no vector type and does not compile loops over bytes to the one instruction that matters
here, vpdpbusd, which multiplies 64 pairs of bytes and adds the products in groups of four. So these
functions emit their instructions themselves. Where the processor lacks an instruction, a function
is built from ones that every processor has. Integer sums are exact, so both versions give the same
bits.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.int8_layout import GROUP, LANES
from deepseek.kernels.numba.emit import BYTE, FLOAT, FLOATS, WORD, WORDS, Emit, loop


def _pair_dot(rows: int) -> Any:
    """Return the intrinsic that adds A B to C: A bf16 `[rows, 2n]`, B bf16 `[n, 64, 2]`, C fp32
    `[rows, 64]`.

    It prefetches the next B, because pages are too far apart for the hardware prefetcher.
    """

    @intrinsic
    def pair_dot(
        _typing: Any, _a: Any, _a_stride: Any, _b: Any, _n: Any, _c: Any, _c_stride: Any, _next: Any
    ) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            emit = Emit(context, builder)
            a, a_stride, b, n, c, c_stride, following = args
            vectors = 64 // LANES
            left = [emit.address(a, builder.mul(a_stride, n.type(r))) for r in range(rows)]
            out = [emit.address(c, builder.mul(c_stride, n.type(r))) for r in range(rows)]
            places = [emit.address(base, 64 * v) for base in out for v in range(vectors)]

            def one_pair(i: Any, sums: list[Any]) -> list[Any]:
                start = builder.mul(i, n.type(256))
                place = builder.mul(i, n.type(4))
                block = emit.address(b, start)
                soon = emit.address(following, start)
                right = [emit.load(WORDS, emit.address(block, 64 * v), 64) for v in range(vectors)]
                for v in range(vectors):
                    emit.prefetch(emit.address(soon, 64 * v))
                results: list[Any] = []
                for r in range(rows):
                    pair = emit.splat(emit.load(WORD, emit.address(left[r], place), 4))
                    results += [
                        emit.add_pairs(sums[r * vectors + v], pair, right[v])
                        for v in range(vectors)
                    ]
                return results

            totals = loop(builder, n, [emit.load(FLOATS, place, 4) for place in places], one_pair)
            for total, place in zip(totals, places, strict=True):
                emit.store(total, place, 4)
            return context.get_dummy_value()

        whole = types.int64
        return types.void(whole, whole, whole, whole, whole, whole, whole), generate

    return pair_dot


pair_dot_1, pair_dot_2, pair_dot_3, pair_dot_6 = (_pair_dot(rows) for rows in (1, 2, 3, 6))


def _rotated(emit: Emit, address: Any) -> Any:
    """Return the 64 fp32 numbers at an address times the unnormalised Hadamard matrix, whose
    entries are 1 and -1.
    """
    floats = ir.VectorType(FLOAT, GROUP)
    value = emit.load(floats, address, 4)
    step = 1
    while step < GROUP:
        other = emit.shuffle(value, [i ^ step for i in range(GROUP)])
        sign = ir.Constant(floats, [-1.0 if i & step else 1.0 for i in range(GROUP)])
        value = emit.fma(value, sign, other)
        step *= 2
    return value


@intrinsic
def rotate(_typing: Any, _x: Any) -> Any:
    """Rotate 64 fp32 numbers in place by the orthogonal Hadamard matrix."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        value = _rotated(Emit(context, builder), args[0])
        eighth = ir.Constant(value.type, [1.0 / GROUP**0.5] * GROUP)
        Emit(context, builder).store(builder.fmul(value, eighth), args[0], 4)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def rotate_and_round(_typing: Any, _x: Any, _bytes: Any, _scale: Any, _correction: Any) -> Any:
    """Quantise a group of 64 fp32 numbers after the Hadamard rotation; store its bytes, its scale
    and its correction.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        floats = ir.VectorType(FLOAT, GROUP)
        words = ir.VectorType(WORD, GROUP)
        value = _rotated(emit, args[0])
        size = emit.call(f"llvm.fabs.v{GROUP}f32", floats, value)
        kind = ir.FunctionType(FLOAT, [floats])
        largest_of = builder.module.declare_intrinsic(
            f"llvm.vector.reduce.fmax.v{GROUP}f32", (), kind
        )
        largest = builder.call(largest_of, [size], fastmath=("nnan",))
        largest = builder.select(
            builder.fcmp_ordered(">", largest, FLOAT(1e-30)), largest, FLOAT(1e-30)
        )
        inverse = emit.splat(builder.fdiv(FLOAT(127.0), largest), GROUP)
        rounded = builder.fptosi(
            emit.call(f"llvm.rint.v{GROUP}f32", floats, builder.fmul(value, inverse)), words
        )
        emit.store(builder.trunc(rounded, ir.VectorType(BYTE, GROUP)), args[1], 1)
        # The orthogonal Hadamard matrix is the unnormalised one divided by 8 = sqrt(GROUP).
        emit.store(builder.fmul(largest, FLOAT(1.0 / (127.0 * GROUP**0.5))), args[2], 4)
        # Weights are stored as q + 128; the correction subtracts 128 times the sum of the row.
        total = emit.call(f"llvm.vector.reduce.add.v{GROUP}i32", WORD, rounded)
        emit.store(builder.mul(total, WORD(-128)), args[3], 4)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(whole, whole, whole, whole), generate


@intrinsic
def arrive(_typing: Any, _counter: Any, _amount: Any) -> Any:
    """Atomically add to the int64 at an address; return the previous value."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], args[1].type.as_pointer())
        return builder.atomic_rmw("add", place, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def look(_typing: Any, _counter: Any) -> Any:
    """Atomically read the int64 at an address, with acquire ordering."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], args[0].type.as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.int64), generate
