"""Products of panels of weights and rows of activations by AMX tiles (`kernels/numba/amx.py`), with
the bits of `panel_dot.py`.

A panel is opened first: its weights become signed bytes, `[groups, 2, 16 steps, 16 outputs, 4]`,
followed by their scales in fp32, `[groups, 32]`. A product of two tiles is then the sum of one
group at 16 rows and 16 outputs. Its 256 numbers go through memory to the vector units, which scale
and add them while the tiles compute the sums that follow.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deepseek.compiled.panel_dot import STEPS, tile_words
from deepseek.kernels.int8_layout import COLUMNS, GROUP, LANES, TILES, group_bytes
from deepseek.kernels.numba import amx
from deepseek.kernels.numba.emit import BYTE, FLOAT, FLOATS, SHORT, WORDS, Emit, loop

TILE_BYTES = amx.ROWS * amx.ROW_BYTES
OPENED_BYTES = TILES * TILE_BYTES + COLUMNS * 4
"""Bytes of a group in an opened panel."""
SUMS = 4  # tiles that hold sums; 4 and 5 hold activations, 6 and 7 weights
AHEAD = 6  # products by which the tiles are ahead of the vector units
SLOTS = 8  # slots for sums in memory, a power of two above AHEAD - SUMS
RING_BYTES = SLOTS * TILE_BYTES
STATE = 4  # numbers that identify the next product


def _open_panel(bits: int) -> Any:
    """Return the intrinsic that opens a panel whose weights have 8 or 4 bits."""

    @intrinsic
    def open_panel(_typing: Any, _panel: Any, _groups: Any, _opened: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            emit = Emit(context, builder)
            panel, groups, opened = args
            scales = emit.address(opened, builder.mul(groups, groups.type(TILES * TILE_BYTES)))
            many = ir.VectorType(BYTE, 4 * LANES)
            # Weights are stored as q + 128, or q + 8.
            offset = ir.Constant(many, [1 << (bits - 1)] * many.count)

            def one_group(g: Any, _carried: list[Any]) -> list[Any]:
                block = emit.address(panel, builder.mul(g, g.type(group_bytes(bits))))
                target = emit.address(opened, builder.mul(g, g.type(TILES * TILE_BYTES)))
                for start in range(STEPS * bits // 8):
                    steps = tile_words(emit, emit.address(block, start * TILES * 64), bits)
                    for step, tiles in enumerate(steps, start * len(steps)):
                        for tile, words in enumerate(tiles):
                            signed = builder.sub(builder.bitcast(words, many), offset)
                            place = emit.address(target, tile * TILE_BYTES + 64 * step)
                            emit.store(signed, place, 64)
                shorts = emit.address(block, COLUMNS * GROUP * bits // 8)
                place = emit.address(scales, builder.mul(g, g.type(COLUMNS * 4)))
                for tile in range(TILES):
                    half = emit.load(
                        ir.VectorType(SHORT, LANES), emit.address(shorts, 32 * tile), 32
                    )
                    emit.store(emit.widen(half), emit.address(place, 64 * tile), 64)
                return []

            loop(builder, groups, [], one_group)
            return context.get_dummy_value()

        whole = types.int64
        return types.void(whole, whole, whole), generate

    return open_panel


open_bytes = _open_panel(8)
open_nibbles = _open_panel(4)


class _Stream:
    """Emits the products of tiles, one after another: of a block of 16 rows with each half of the
    panel, group by group, then of the next block.

    Its state is the number of the product, its group, its half and its block.

    Args:
        context: numba's target context.
        emit: emits the other instructions.
        args: the arguments of `tile_dot`.
    """

    def __init__(self, context: Any, emit: Emit, args: list[Any]) -> None:
        self.context = context
        self.emit = emit
        self.opened, self.rows, self.stride, self.count, self.groups, _, self.ring = args

    def first_row(self, block: Any) -> Any:
        """Return the first row of a block; the last block begins 16 rows before the end."""
        builder = self.emit.builder
        row = builder.mul(block, block.type(amx.ROWS))
        last = builder.sub(self.count, block.type(amx.ROWS))
        return builder.select(builder.icmp_signed("<", row, last), row, last)

    def slot(self, number: Any) -> Any:
        """Return the address of the sums of a product."""
        builder = self.emit.builder
        place = builder.and_(number, number.type(SLOTS - 1))
        return builder.add(self.ring, builder.mul(place, number.type(TILE_BYTES)))

    def push(self, state: list[Any]) -> list[Any]:
        """Emit a product, and the store of the one that was in the same tile; return the state of
        the next one.
        """
        builder = self.emit.builder
        number, group, half, block = state
        whole = number.type
        row = builder.add(self.rows, builder.mul(self.first_row(block), self.stride))
        a = builder.add(row, builder.mul(group, whole(GROUP)))
        tile = builder.add(builder.mul(group, whole(TILES)), half)
        b = builder.add(self.opened, builder.mul(tile, whole(TILE_BYTES)))
        slot = self.slot(builder.sub(number, whole(SUMS)))
        cases = [builder.append_basic_block("product") for _ in range(SUMS)]
        after = builder.append_basic_block("products")
        switch = builder.switch(builder.and_(number, whole(SUMS - 1)), cases[0])
        for c, case in enumerate(cases):
            if c:
                switch.add_case(whole(c), case)
            builder.position_at_end(case)
            self._product(c, a, b, slot)
            builder.branch(after)
        builder.position_at_end(after)
        group = builder.add(group, whole(1))
        over = builder.icmp_signed("==", group, self.groups)
        half = builder.add(half, builder.zext(over, whole))
        through = builder.icmp_signed("==", half, whole(TILES))
        return [
            builder.add(number, whole(1)),
            builder.select(over, whole(0), group),
            builder.select(through, whole(0), half),
            builder.add(block, builder.zext(through, whole)),
        ]

    def _product(self, c: int, a: Any, b: Any, slot: Any) -> None:
        builder = self.emit.builder

        def instruct(name: str, *args: Any) -> None:
            amx.emit(self.context, builder, name, *args)

        def pointer(address: Any) -> Any:
            return builder.inttoptr(address, BYTE.as_pointer())

        left = SUMS + c % 2
        right = SUMS + 2 + c % 2
        line = slot.type(amx.ROW_BYTES)
        instruct("tileloadd64", left, pointer(a), self.stride)
        instruct("tileloadd64", right, pointer(b), line)
        # The store comes this late, because one that waits for its product stalls those behind it.
        instruct("tilestored64", c, pointer(slot), line)
        instruct("tilezero", c)
        instruct("tdpbssd", c, left, right)


def _scale_sums(
    emit: Emit, slot: Any, row_scales: list[Any], column_scales: Any, totals: list[Any]
) -> list[Any]:
    """Return the totals of 16 rows plus the sums of a group times the scales of rows and columns.

    The operations are those of `panel_dot`.
    """
    results = []
    for r, (address, total) in enumerate(zip(row_scales, totals, strict=True)):
        sums = emit.load(WORDS, emit.address(slot, r * amx.ROW_BYTES), 64)
        both = emit.builder.fmul(column_scales, emit.splat(emit.load(FLOAT, address, 4)))
        results.append(emit.fma(emit.builder.sitofp(sums, FLOATS), both, total))
    return results


@intrinsic
def tile_dot(
    _typing: Any,
    _opened: Any,
    _rows: Any,
    _stride: Any,
    _count: Any,
    _groups: Any,
    _out: Any,
    _ring: Any,
) -> Any:
    """Multiply an opened panel by `count` rows, 16 or more, that lie `stride` bytes apart.

    `out` is the address of the product, fp32 `[count, 32]`; `ring` that of RING_BYTES of memory.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if not amx.exists(context):
            return context.get_dummy_value()
        emit = Emit(context, builder)
        stream = _Stream(context, emit, args)
        opened, rows, stride, count, groups, out, _ = args
        whole = count.type
        scales = emit.address(opened, builder.mul(groups, whole(TILES * TILE_BYTES)))

        def one_block(block: Any, state: list[Any]) -> list[Any]:
            first = stream.first_row(block)
            row = builder.add(rows, builder.mul(first, stride))
            row = builder.add(row, builder.mul(groups, whole(GROUP)))
            row_scales = [builder.add(row, builder.mul(stride, whole(r))) for r in range(amx.ROWS)]
            target = builder.add(out, builder.mul(first, whole(COLUMNS * 4)))

            def one_half(half: Any, state: list[Any]) -> list[Any]:
                at = builder.mul(half, whole(LANES * 4))

                def one_group(g: Any, carried: list[Any]) -> list[Any]:
                    slot = stream.slot(builder.sub(carried[0], whole(AHEAD)))
                    state = stream.push(carried[:STATE])
                    place = builder.mul(g, whole(4))
                    column = builder.add(at, builder.mul(g, whole(COLUMNS * 4)))
                    column_scales = emit.load(FLOATS, builder.add(scales, column), 64)
                    places = [builder.add(base, place) for base in row_scales]
                    totals = carried[STATE:]
                    return state + _scale_sums(emit, slot, places, column_scales, totals)

                zeros = [ir.Constant(FLOATS, [0.0] * LANES)] * amx.ROWS
                results = loop(builder, groups, state + zeros, one_group)
                for r, total in enumerate(results[STATE:]):
                    place = builder.add(at, whole(r * COLUMNS * 4))
                    emit.store(total, builder.add(target, place), 4)
                return results[:STATE]

            return loop(builder, whole(TILES), state, one_half)

        state = [whole(0)] * STATE
        state = loop(builder, whole(AHEAD), state, lambda _, carried: stream.push(carried))
        blocks = builder.udiv(builder.add(count, whole(amx.ROWS - 1)), whole(amx.ROWS))
        loop(builder, blocks, state, one_block)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(whole, whole, whole, whole, whole, whole, whole), generate
