"""Products of one query with single tokens, and the scores of its buckets, written in LLVM IR (see
`kernels/numba/emit.py`).

LSH attention reads tokens at arbitrary addresses, each with its key before its value. Numba's loops
would keep the sums in memory, and add up the lanes of each key separately.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.int8_layout import GROUP, LANES
from deepseek.kernels.numba.emit import FLOAT, FLOATS, WORD, WORDS, Emit, loop
from deepseek.kernels.numba.vector_math import floats

TOKENS = LANES
"""Tokens that are scored at once."""

_TOGETHER = 4  # tokens whose sums are kept in registers, of which AVX2 has few
_VECTORS = GROUP // LANES


def _merge(emit: Emit, a: Any, b: Any, step: int) -> Any:
    """Return the sums of lanes `step` apart: those of `b` in lanes with this bit, else of `a`."""
    lanes = range(LANES)
    own = [i + LANES if i & step else i for i in lanes]
    other = [i ^ step for i in own]
    parts = [emit.builder.shuffle_vector(a, b, ir.Constant(WORDS, order)) for order in (own, other)]
    return emit.builder.fadd(*parts)


def _lane_sums(emit: Emit, vectors: list[Any], step: int = 1) -> Any:
    """Return the sum of each vector's lanes, in the lane of its number.

    There is one vector of sums for each `LANES` vectors. All sums run in the same order.
    """
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [_merge(emit, *pair, step) for pair in pairs]
        step *= 2
    return vectors[0]


@intrinsic
def score_tokens(
    _typing: Any, _query: Any, _tokens: Any, _count: Any, _width: Any, _scores: Any
) -> Any:
    """Set the scores of tokens: the products of their keys with a query.

    Args are addresses, and numbers: the query, bf16 `[width]`; the addresses of the keys, bf16
    `[width]` each, int64 `[count]`; their number, a multiple of 16; the width, a multiple of 32;
    the scores, fp32 `[count]`.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        query, tokens, count, width, scores = args
        whole = count.type
        steps = builder.udiv(width, whole(2 * LANES))

        def few(first: Any) -> Any:
            """Return the partial sums of the tokens whose addresses lie at `first`."""
            keys = [emit.load(whole, emit.address(first, 8 * t), 8) for t in range(_TOGETHER)]

            def one_step(i: Any, sums: list[Any]) -> list[Any]:
                at = builder.mul(i, whole(64))
                words = emit.load(WORDS, emit.address(query, at), 4)
                parts = [emit.load(WORDS, emit.address(key, at), 4) for key in keys]
                return [
                    emit.add_pairs(total, words, part)
                    for total, part in zip(sums, parts, strict=True)
                ]

            return _lane_sums(emit, loop(builder, steps, [floats(0.0)] * _TOGETHER, one_step))

        def block(i: Any, _carried: list[Any]) -> list[Any]:
            first = emit.address(tokens, builder.mul(i, whole(8 * TOKENS)))
            offsets = range(0, 8 * TOKENS, 8 * _TOGETHER)
            sums = [few(emit.address(first, offset)) for offset in offsets]
            total = _lane_sums(emit, sums, _TOGETHER)
            emit.store(total, emit.address(scores, builder.mul(i, whole(4 * LANES))), 4)
            return []

        loop(builder, builder.udiv(count, whole(TOKENS)), [], block)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(whole, whole, whole, whole, whole), generate


@intrinsic
def mix_tokens(
    _typing: Any, _weights: Any, _values: Any, _count: Any, _offset: Any, _width: Any, _out: Any
) -> Any:
    """Set `out` to the weighted sum of tokens' values.

    Args are addresses, and numbers: the weights, fp32 `[count]`; the addresses of the tokens, int64
    `[count]`; their number, at least 1; the offset in bytes of a token's value, bf16 `[width]`; the
    width, a multiple of 64; the result, fp32 `[width]`.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        weights, values, count, offset, width, out = args
        whole = count.type
        places = range(0, 2 * GROUP, 64)
        high = ir.Constant(WORDS, [0xFFFF0000 - (1 << 32)] * LANES)

        def part(p: Any, _carried: list[Any]) -> list[Any]:
            start = emit.address(offset, builder.mul(p, whole(2 * GROUP)))

            def one_token(n: Any, sums: list[Any]) -> list[Any]:
                value = emit.load(whole, emit.address(values, builder.mul(n, whole(8))), 8)
                base = emit.address(value, start)
                place = emit.address(weights, builder.mul(n, whole(4)))
                weight = emit.splat(emit.load(FLOAT, place, 4))
                results = []
                for v, at in enumerate(places):
                    words = emit.load(WORDS, emit.address(base, at), 4)
                    even = builder.shl(words, ir.Constant(WORDS, [16] * LANES))
                    for i, half in enumerate((even, builder.and_(words, high))):
                        numbers = builder.bitcast(half, FLOATS)
                        results.append(emit.fma(weight, numbers, sums[2 * v + i]))
                return results

            sums = loop(builder, count, [floats(0.0)] * _VECTORS, one_token)
            target = emit.address(out, builder.mul(p, whole(4 * GROUP)))
            order = [i // 2 + i % 2 * LANES for i in range(2 * LANES)]
            mask = ir.Constant(ir.VectorType(WORD, 2 * LANES), order)
            for v, at in enumerate(places):
                both = builder.shuffle_vector(sums[2 * v], sums[2 * v + 1], mask)
                emit.store(both, emit.address(target, 2 * at), 4)
            return []

        loop(builder, builder.udiv(width, whole(GROUP)), [], part)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(whole, whole, whole, whole, whole, whole), generate


@intrinsic
def score_buckets(
    _typing: Any, _x: Any, _matrix: Any, _width: Any, _buckets: Any, _scores: Any
) -> Any:
    """Set the scores of buckets: `x` times a matrix, plus its last row.

    Args are addresses, and numbers: `x`, fp32 `[width]`; the matrix, fp32 `[width + 1, buckets]`;
    the width; the number of buckets, a multiple of 64; the scores, fp32 `[buckets]`.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        x, matrix, width, buckets, scores = args
        whole = width.type
        stride = builder.mul(buckets, whole(4))
        places = range(0, 4 * GROUP, 4 * LANES)

        def part(p: Any, _carried: list[Any]) -> list[Any]:
            at = builder.mul(p, whole(4 * GROUP))
            columns = emit.address(matrix, at)

            def row(k: Any) -> list[Any]:
                start = emit.address(columns, builder.mul(k, stride))
                return [emit.load(FLOATS, emit.address(start, place), 4) for place in places]

            def one_row(k: Any, sums: list[Any]) -> list[Any]:
                value = emit.splat(emit.load(FLOAT, emit.address(x, builder.mul(k, whole(4))), 4))
                pairs = zip(row(k), sums, strict=True)
                return [emit.fma(value, weights, total) for weights, total in pairs]

            sums = loop(builder, width, row(width), one_row)
            for total, place in zip(sums, places, strict=True):
                emit.store(total, emit.address(emit.address(scores, at), place), 4)
            return []

        loop(builder, builder.udiv(buckets, whole(GROUP)), [], part)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(whole, whole, whole, whole, whole), generate
