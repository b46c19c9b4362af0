"""Vector instructions in LLVM IR, for the innermost loops of kernels.

Numba has no vector type. Functions that need vectors emit their instructions themselves, through
numba's `intrinsic`. Where the processor lacks an instruction, `Emit` uses ones that every processor
has.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from deepseek.kernels.int8_layout import LANES

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
