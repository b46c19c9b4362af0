"""The innermost loops of the compiled decode step, written as vector instructions in LLVM IR.

Numba has no vector type and does not compile loops over bytes to the one instruction that matters
here, vpdpbusd, which multiplies 64 pairs of bytes and adds the products in groups of four. So these
functions emit their instructions themselves. Where the processor lacks an instruction, a function
is built from ones that every processor has. Integer sums are exact, so both versions give the same
bits.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.int8_layout import GROUP, LANES

BYTE = ir.IntType(8)
SHORT = ir.IntType(16)
WORD = ir.IntType(32)
FLOAT = ir.FloatType()
WORDS = ir.VectorType(WORD, LANES)
FLOATS = ir.VectorType(FLOAT, LANES)


class Emit:
    """Emits instructions into a function under construction.

    Args:
        context: numba's target context.
        builder: the IR builder of the function.

    Attributes:
        features: the processor's features.
        sums_bytes: whether the processor has vpdpbusd.
    """

    def __init__(self, context: Any, builder: Any) -> None:
        self.builder = builder
        features = context.codegen().magic_tuple()[2]
        self.features = set(features.split(","))
        self.sums_bytes = "+avx512vnni" in self.features

    def call(self, name: str, result: Any, *args: Any) -> Any:
        """Call an LLVM intrinsic."""
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return self.builder.call(self.builder.module.declare_intrinsic(name, (), kind), args)

    def address(self, base: Any, offset: Any) -> Any:
        """Return `base + offset` bytes."""
        return self.builder.add(base, base.type(offset) if isinstance(offset, int) else offset)

    def load(self, kind: Any, address: Any, align: int) -> Any:
        """Load a value of type `kind`."""
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def prefetch(self, address: Any) -> None:
        """Prefetch a cache line into the second-level cache; the address need not be valid."""
        place = self.builder.inttoptr(address, BYTE.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, WORD, WORD, WORD])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", (place.type,), kind)
        self.builder.call(function, [place, WORD(0), WORD(2), WORD(1)])

    def store(self, value: Any, address: Any, align: int) -> None:
        """Store a value."""
        self.builder.store(
            value, self.builder.inttoptr(address, value.type.as_pointer()), align=align
        )

    def splat(self, value: Any, lanes: int = LANES) -> Any:
        """Return the vector whose lanes all hold `value`."""
        single = self.builder.insert_element(
            ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, WORD(0)
        )
        return self.shuffle(single, [0] * lanes)

    def shuffle(self, vector: Any, order: list[int]) -> Any:
        """Return the lanes of `vector` in the given order."""
        undefined = ir.Constant(vector.type, ir.Undefined)
        return self.builder.shuffle_vector(
            vector, undefined, ir.Constant(ir.VectorType(WORD, len(order)), order)
        )

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c, rounded once."""
        return self.call(f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)

    def widen(self, shorts: Any) -> Any:
        """Convert bf16 numbers, given as 16-bit integers, to fp32."""
        words = self.builder.zext(shorts, ir.VectorType(WORD, shorts.type.count))
        return self.builder.bitcast(self._shift(words), ir.VectorType(FLOAT, shorts.type.count))

    def _shift(self, words: Any) -> Any:
        return self.builder.shl(words, ir.Constant(words.type, [16] * words.type.count))

    def add_products(self, sums: Any, signed: Any, unsigned: Any) -> Any:
        """Add to each of 16 int32 sums the dot product of four signed and four unsigned bytes."""
        if self.sums_bytes:
            return self.call("llvm.x86.avx512.vpdpbusd.512", WORDS, sums, unsigned, signed)
        shorts = ir.VectorType(SHORT, 2 * LANES)
        wide = ir.VectorType(WORD, 2 * LANES)
        eight = ir.Constant(shorts, [8] * 2 * LANES)
        low = ir.Constant(shorts, [255] * 2 * LANES)
        a = self.builder.bitcast(unsigned, shorts)
        b = self.builder.bitcast(signed, shorts)
        odd = (self.builder.lshr(a, eight), self.builder.ashr(b, eight))
        even = (self.builder.and_(a, low), self.builder.ashr(self.builder.shl(b, eight), eight))
        # LLVM turns this pattern, products of 16-bit numbers added in pairs, into x86's pmaddwd.
        for left, right in (even, odd):
            products = self.builder.mul(
                self.builder.sext(left, wide), self.builder.sext(right, wide)
            )
            first, second = (
                self.shuffle(products, list(range(start, 2 * LANES, 2))) for start in (0, 1)
            )
            sums = self.builder.add(sums, self.builder.add(first, second))
        return sums

    def add_pairs(self, sums: Any, a: Any, b: Any) -> Any:
        """Add to each of 16 fp32 sums the dot product of two bf16 numbers of `a` and two of `b`,
        given as 32-bit words.
        """
        if "+avx512bf16" in self.features:
            return self.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, sums, a, b)
        high = ir.Constant(WORDS, [0xFFFF0000 - (1 << 32)] * LANES)
        for part in (lambda words: self.builder.and_(words, high), self._shift):
            left, right = (self.builder.bitcast(part(words), FLOATS) for words in (a, b))
            sums = self.fma(left, right, sums)
        return sums


def loop(
    builder: Any, count: Any, start: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """Emit `for i in range(count)` with values carried from one iteration to the next.

    The body runs at least once.

    Args:
        builder: the IR builder.
        count: number of iterations.
        start: initial values.
        body: emits the body, given the index and the current values; returns the next values.

    Returns:
        The final values.
    """
    before = builder.block
    inside = builder.append_basic_block("loop")
    builder.branch(inside)
    builder.position_at_end(inside)
    index = builder.phi(count.type)
    carried = [builder.phi(value.type) for value in start]
    results = body(index, carried)
    following = builder.add(index, count.type(1))
    for phi, first, value in zip(
        [index, *carried], [count.type(0), *start], [following, *results], strict=True
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(value, builder.block)
    after = builder.append_basic_block("after")
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    builder.position_at_end(after)
    return results


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
