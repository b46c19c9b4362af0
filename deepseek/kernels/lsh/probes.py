"""Top-k selection of the buckets that each query probes."""

from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from deepseek.kernels.int8_layout import LANES
from deepseek.kernels.numba.emit import FLOATS, WORD, Emit, loop
from deepseek.kernels.numba.launch import compiled, launch, unpack
from deepseek.kernels.numba.primitives import share
from deepseek.kernels.numba.subroutine import subroutine
from deepseek.kernels.numba.transpose import transpose


@intrinsic
def _exceeds(_typing: Any, _scores: Any, _least: Any) -> Any:
    """Return whether in any lane the score is higher than the least of the best scores."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        scores, least = (emit.load(FLOATS, address, 4) for address in args)
        higher = builder.fcmp_ordered(">", scores, least)
        bits = builder.bitcast(higher, ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, bits.type(0))

    return types.boolean(types.int64, types.int64), generate


@intrinsic
def _insert(_typing: Any, _scores: Any, _bucket: Any, _best: Any, _found: Any, _probes: Any) -> Any:
    """Insert the scores of a bucket into the best ones of each lane, highest first."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emit(context, builder)
        scores, bucket, best, found, probes = args

        def one(p: Any, carried: list[Any]) -> list[Any]:
            offset = builder.mul(p, p.type(4 * LANES))
            places = [emit.address(base, offset) for base in (best, found)]
            olds = [emit.load(new.type, at, 4) for new, at in zip(carried, places, strict=True)]
            higher = builder.fcmp_ordered(">", carried[0], olds[0])
            for new, old, at in zip(carried, olds, places, strict=True):
                emit.store(builder.select(higher, new, old), at, 4)
            return [
                builder.select(higher, old, new) for new, old in zip(carried, olds, strict=True)
            ]

        buckets = emit.splat(builder.trunc(bucket, WORD))
        loop(builder, probes, [emit.load(FLOATS, scores, 4), buckets], one)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@subroutine
def _columns(scores, row, c, tile):  # type: ignore[no-untyped-def]
    """Set `tile` to the transpose of 16 rows and 16 columns of the scores, from `row` and c on, and
    to -inf beyond the last ones.
    """
    rows = len(scores) - row
    columns = scores.shape[1] - c
    if min(rows, columns) >= LANES:
        stride = 4 * scores.shape[1]
        start = scores.ctypes.data + row * stride + 4 * c
        transpose(start, stride, tile.ctypes.data, 4 * LANES, LANES, LANES)
        return
    tile[:] = -np.inf
    for i in range(min(rows, LANES)):
        for j in range(min(columns, LANES)):
            tile[j, i] = scores[row + i, c + j]


@subroutine
def _run(scores, codes):  # type: ignore[no-untyped-def]
    """Keep the best scores of 16 rows at a time, one row in each lane, sorted while scanning."""
    probes = codes.shape[1]
    tile = np.empty((LANES, LANES), np.float32)
    best = np.empty((probes, LANES), np.float32)
    found = np.empty((probes, LANES), np.int32)
    tile_at = tile.ctypes.data
    best_at = best.ctypes.data
    found_at = found.ctypes.data
    least_at = best_at + 4 * LANES * (probes - 1)
    first, last = share(len(scores))
    for row in range(first, last, LANES):
        best[:] = -np.inf
        found[:] = 0
        for c in range(0, scores.shape[1], LANES):
            _columns(scores, row, c, tile)
            for j in range(min(LANES, scores.shape[1] - c)):
                one = tile_at + 4 * LANES * j
                if _exceeds(one, least_at):
                    _insert(one, c + j, best_at, found_at, probes)
        for i in range(min(LANES, last - row)):
            for p in range(probes):
                codes[row + i, p] = found[p, i]


@cache
def _kernel(kinds: str) -> int:
    return compiled(lambda data: _run(*unpack(data, kinds)))


def likeliest(scores: Tensor, probes: int) -> Tensor:
    """Compute `attention.likeliest` for fp32 scores on a CPU."""
    codes = torch.empty(*scores.shape[:-1], probes, dtype=torch.int64)
    launch(_kernel, scores.contiguous().view(-1, scores.shape[-1]), codes.view(-1, probes))
    return codes
