"""Products of panels of weights and rows of activations, written in LLVM IR (see
`kernels/numba/emit.py`).
"""

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.int8_layout import COLUMNS, GROUP, LANES, TILES, group_bytes
from deepseek.kernels.numba.emit import FLOAT, FLOATS, SHORT, WORD, WORDS, Emit, loop

STEPS = GROUP // 4  # a step takes four bytes of each of the 16 lanes

AHEAD = 2048
"""Distance in bytes at which weights are prefetched. The hardware prefetcher stops at the end of a
page of 4 KiB, so that a thread would wait for memory once every two groups of 8-bit weights.
"""


def _scaled(
    emit: Emit, sums: list[Any], factors: list[Any], weight_scales: Any, totals: list[Any]
) -> list[Any]:
    """Return the totals of all rows and tiles plus the integer sums of one group, multiplied by the
    scales of weights and rows.
    """
    shorts = ir.VectorType(SHORT, LANES)
    results = []
    scales = [
        emit.widen(emit.load(shorts, emit.address(weight_scales, t * 32), 32)) for t in range(TILES)
    ]
    for r, factor in enumerate(factors):
        row_scale = emit.splat(factor)
        for place, scale in enumerate(scales, r * TILES):
            both = emit.builder.fmul(scale, row_scale)
            results.append(emit.fma(emit.builder.sitofp(sums[place], FLOATS), both, totals[place]))
    return results


def _byte_tiles(emit: Emit, start: Any) -> list[list[Any]]:
    """Return the weights of one step, tile by tile."""
    return [[emit.load(WORDS, emit.address(start, 64 * tile), 64) for tile in range(TILES)]]


def _nibble_tiles(emit: Emit, start: Any) -> list[list[Any]]:
    """Return the 4-bit weights of two steps, each tile by tile."""
    both = _byte_tiles(emit, start)[0]
    low = ir.Constant(WORDS, [0x0F0F0F0F] * LANES)
    four = ir.Constant(WORDS, [4] * LANES)
    return [
        [emit.builder.and_(words, low) for words in both],
        [emit.builder.and_(emit.builder.lshr(words, four), low) for words in both],
    ]


def tile_words(emit: Emit, start: Any, bits: int) -> list[list[Any]]:
    """Return the weights that share bytes: those of one step, or with 4 bits of two, each tile by
    tile.
    """
    return (_byte_tiles if bits == 8 else _nibble_tiles)(emit, start)


def _correction(emit: Emit, address: Any, bits: int) -> Any:
    """Return the initial value of a row's sums, in all lanes.

    Rows are stored with the correction for weights q + 128: -128 times their sum. Weights of 4 bits
    are q + 8 and need a sixteenth of it.
    """
    stored = emit.load(WORD, address, 4)
    return emit.splat(stored if bits == 8 else emit.builder.ashr(stored, WORD(4)))


def _group_sums(emit: Emit, block: Any, inputs: list[Any], sums: list[Any], bits: int) -> list[Any]:
    """Return the integer sums of a group.

    Args:
        emit: emits the instructions.
        block: address of the group's weights.
        inputs: address of the group's activations in each row.
        sums: initial sums, by row and tile.
        bits: bits of a weight.
    """
    steps = 8 // bits  # number of steps whose weights share bytes
    builder = emit.builder

    def one_load(number: Any, sums: list[Any]) -> list[Any]:
        offset = builder.mul(number, number.type(4 * steps))
        start = emit.address(block, builder.mul(number, number.type(TILES * 64)))
        for tile in range(TILES):
            emit.prefetch(emit.address(start, AHEAD + 64 * tile))
        for step, tiles in enumerate(tile_words(emit, start, bits)):
            places = [emit.address(emit.address(base, offset), 4 * step) for base in inputs]
            words = [emit.splat(emit.load(WORD, place, 4)) for place in places]
            pairs = product(words, tiles)
            sums = [emit.add_products(sum_, *pair) for sum_, pair in zip(sums, pairs, strict=True)]
        return sums

    if emit.sums_bytes:
        for number in range(STEPS // steps):
            sums = one_load(block.type(number), sums)
        return sums
    # Unrolled, LLVM would keep more values alive than there are registers.
    return loop(builder, block.type(STEPS // steps), sums, one_load)


def _panel_dot(rows: int, bits: int = 8) -> Any:
    """Return the intrinsic that multiplies a panel of weights with 8 or 4 bits by `rows` rows at
    once (see `kernels/int8.py`).
    """

    @intrinsic
    def panel_dot(_typing: Any, _panel: Any, _rows: Any, _groups: Any, _out: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            emit = Emit(context, builder)
            panel, table, groups, out = args
            row = [emit.load(groups.type, emit.address(table, 8 * r), 8) for r in range(rows)]
            scales = [emit.address(base, builder.mul(groups, groups.type(GROUP))) for base in row]
            corrections = [
                emit.address(base, builder.mul(groups, groups.type(4))) for base in scales
            ]

            def one_group(g: Any, totals: list[Any]) -> list[Any]:
                block = emit.address(panel, builder.mul(g, g.type(group_bytes(bits))))
                at = builder.mul(g, g.type(GROUP))
                place = builder.mul(g, g.type(4))
                inputs = [emit.address(base, at) for base in row]
                first = [_correction(emit, emit.address(base, place), bits) for base in corrections]
                sums = [correction for correction in first for _ in range(TILES)]
                sums = _group_sums(emit, block, inputs, sums, bits)
                factors = [emit.load(FLOAT, emit.address(base, place), 4) for base in scales]
                weight_scales = emit.address(block, COLUMNS * GROUP * bits // 8)
                emit.prefetch(emit.address(weight_scales, AHEAD))
                return _scaled(emit, sums, factors, weight_scales, totals)

            zero = ir.Constant(FLOATS, [0.0] * LANES)
            for place, total in enumerate(
                loop(builder, groups, [zero] * (rows * TILES), one_group)
            ):
                emit.store(total, emit.address(out, place * 64), 4)
            return context.get_dummy_value()

        whole = types.int64
        return types.void(whole, whole, whole, whole), generate

    return panel_dot


panel_dot_1, panel_dot_2, panel_dot_4, panel_dot_8 = (_panel_dot(rows) for rows in (1, 2, 4, 8))
nibble_dot_1, nibble_dot_2, nibble_dot_4, nibble_dot_8 = (
    _panel_dot(rows, 4) for rows in (1, 2, 4, 8)
)
