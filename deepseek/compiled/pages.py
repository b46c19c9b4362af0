"""Addresses within the pages of keys and values (see `PageShape` of `compiled/state.py`)."""

import numpy as np
from numba import carray

from deepseek.compiled.abi import PAGE
from deepseek.kernels.numba.primitives import pointer
from deepseek.kernels.numba.subroutine import subroutine


@subroutine(error_model="numpy")
def _layer(batch, chunk, page, layer):  # type: ignore[no-untyped-def]
    """Return the address of a layer's keys, values and kappa in page `page` of a chunk."""
    pages = batch.pages[batch.part_of_layer[layer]]
    return pages[chunk, page] + layer * batch.layer_bytes


@subroutine(error_model="numpy")
def plane(weights, batch, chunk, page, layer, group, kind):  # type: ignore[no-untyped-def]
    """Return the address of a page's keys (kind 0) `[K/2, 64, 2]` or values (kind 1) `[K/64, 32,
    64, 2]` at a layer and group.
    """
    return _layer(batch, chunk, page, layer) + (group * 2 + kind) * weights.page_width * PAGE * 2


@subroutine(error_model="numpy")
def kappa(weights, batch, chunk, page, layer, head):  # type: ignore[no-untyped-def]
    """Return the sums `[64]` of a head in page `page` of a chunk, and what they are relative to
    `[1]`.
    """
    memory = _layer(batch, chunk, page, layer)
    sums = memory + weights.groups * weights.page_width * PAGE * 4
    starts = sums + weights.heads * PAGE * 4
    return (
        carray(pointer(sums + head * PAGE * 4), (PAGE,), np.float32),
        carray(pointer(starts + head * 8), (1,), np.float64),
    )
