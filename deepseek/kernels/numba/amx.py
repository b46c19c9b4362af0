"""Intel AMX inside kernels: eight tiles of 16 rows of 64 bytes, and their products.

A thread calls `configure` before it uses tiles and `release` afterwards. A kernel is compiled for
the processor that it runs on, so on one without AMX these functions emit nothing: a caller passes
the result of `available` to the kernel and calls them only if it is true.

A product adds A B to C. A has 16 rows of 64 bytes. Row k of B holds, for each of the 16 columns of
C, the 4 bytes that bytes 4k to 4k + 3 of A's rows are multiplied with. C is 16 x 16 numbers of 4
bytes. Tiles are given by their numbers 0 to 7, which must be constants.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

import ctypes
import platform
import sys
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from deepseek.kernels.numba.subroutine import subroutine

ROWS = 16
ROW_BYTES = 64
_TILES = 8

# Linux saves the tiles of a process only if it asks for that: arch_prctl(ARCH_REQ_XCOMP_PERM,
# XFEATURE_XTILEDATA).
_ARCH_PRCTL = 158
_REQUEST_PERMISSION = 0x1023
_TILE_DATA = 18


def _setup(rows: int) -> bytes:
    """Return the operand of LDTILECFG that gives tiles 0 to 5 `rows` rows, and 6 and 7 all 16.

    It has palette 1, then the bytes of a row of each tile as 16-bit numbers from byte 16 on, and
    the rows of each tile from byte 48 on.
    """
    setup = bytearray(64)
    setup[0] = 1
    setup[16 : 16 + 2 * _TILES] = ROW_BYTES.to_bytes(2, "little") * _TILES
    setup[48 : 48 + _TILES] = bytes([*[rows] * (_TILES - 2), ROWS, ROWS])
    return bytes(setup)


_SETUPS = b"".join(map(_setup, range(1, ROWS + 1)))


@cache
def available() -> bool:
    """Whether kernels can use tiles: the processor has AMX, and Linux permits this process to use
    it.
    """
    if not (sys.platform == "linux" and platform.machine() == "x86_64"):
        return False
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-int8", "amx-bf16")):
        return False
    # Threads that exist already have the permission too.
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def exists(context: Any) -> bool:
    """Whether the processor that `context` compiles for has tiles."""
    return "+amx-int8" in context.codegen().magic_tuple()[2].split(",")


def emit(context: Any, builder: Any, name: str, *args: Any) -> Any:
    """Emit an instruction on tiles, unless the processor has none; integers are tile numbers."""
    if exists(context):
        values = [ir.IntType(8)(arg) if isinstance(arg, int) else arg for arg in args]
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.module.declare_intrinsic(f"llvm.x86.{name}", (), kind), values)
    return context.get_dummy_value()


@intrinsic
def configure_rows(_typing: Any, _rows: Any) -> Any:
    """Give tiles 0 to 5 of the calling thread `rows` rows, 1 to 16, and tiles 6 and 7 all 16.

    So A and C can have fewer rows than B, which is in tile 6 or 7.
    """

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        setups = context.insert_const_bytes(builder.module, _SETUPS, "tile_setups")
        place = builder.mul(builder.sub(args[0], args[0].type(1)), args[0].type(ROW_BYTES))
        setup = builder.gep(setups, [place], source_etype=ir.IntType(8))
        return emit(context, builder, "ldtilecfg", setup)

    return types.void(types.int64), generate


@subroutine
def configure():  # type: ignore[no-untyped-def]
    """Give all tiles of the calling thread 16 rows of 64 bytes."""
    configure_rows(ROWS)


@intrinsic
def release(_typing: Any) -> Any:
    """Return the tiles of the calling thread to their initial state."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        return emit(context, builder, "tilerelease")

    return types.void(), generate


@intrinsic(prefer_literal=True)
def zero(_typing: Any, tile: Any) -> Any:
    """Set a tile to zero."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        return emit(context, builder, "tilezero", tile.literal_value)

    return types.void(tile), generate


def _move(name: str) -> Any:
    """Return the intrinsic that moves a tile from or to memory."""

    @intrinsic(prefer_literal=True)
    def move(_typing: Any, tile: Any, _address: Any, _stride: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            _, address, stride = args
            place = builder.inttoptr(address, ir.IntType(8).as_pointer())
            return emit(context, builder, name, tile.literal_value, place, stride)

        return types.void(tile, types.int64, types.int64), generate

    return move


def _product(name: str) -> Any:
    """Return the intrinsic that adds the product of two tiles to a third one."""

    @intrinsic(prefer_literal=True)
    def add_product(_typing: Any, c: Any, a: Any, b: Any) -> Any:
        tiles = [tile.literal_value for tile in (c, a, b)]

        def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
            return emit(context, builder, name, *tiles)

        return types.void(c, a, b), generate

    return add_product


load = _move("tileloadd64")
"""`load(tile, address, stride)` reads 16 rows of 64 bytes that lie `stride` bytes apart."""
store = _move("tilestored64")
"""`store(tile, address, stride)` writes them."""
add_signed = _product("tdpbssd")
"""`add_signed(c, a, b)` adds products of four signed and four signed bytes to int32 sums."""
add_unsigned = _product("tdpbsud")
"""`add_unsigned(c, a, b)` adds products of four signed and four unsigned bytes to int32 sums."""
add_pairs = _product("tdpbf16ps")
"""`add_pairs(c, a, b)` adds products of two and two bf16 numbers to fp32 sums."""
