"""Addresses within the pages of keys and values (see `compiled/page_shape.py`)."""

import numpy as np
from numba import carray

from deepseek.compiled.abi import PAGE, ROUNDS
from deepseek.kernels.numba.primitives import pointer
from deepseek.kernels.numba.subroutine import subroutine


@subroutine(error_model="numpy")
def layer_address(batch, chunk, page, layer):  # type: ignore[no-untyped-def]
    """Return the address of a layer in page `page` of a chunk."""
    pages = batch.pages[batch.part_of_layer[layer]]
    return pages[chunk, page] + layer * batch.layer_bytes


@subroutine(error_model="numpy")
def plane(weights, batch, chunk, page, layer, group, kind):  # type: ignore[no-untyped-def]
    """Return the address of a page's keys (kind 0) `[K/2, 64, 2]` or values (kind 1) `[K/64, 32,
    64, 2]` at a layer and group.
    """
    place = (group * 2 + kind) * weights.page_width * PAGE * 2
    return layer_address(batch, chunk, page, layer) + place


@subroutine(error_model="numpy")
def token_row(weights, batch, chunk, position, layer, group):  # type: ignore[no-untyped-def]
    """Return the address of a token's key `[K]`, before its value `[K]`, at a layer with LSH
    attention.
    """
    slot = group * PAGE + position % PAGE
    return layer_address(batch, chunk, position // PAGE, layer) + slot * weights.page_width * 4


@subroutine(error_model="numpy")
def codes_address(weights, batch, chunk, page, layer, group):  # type: ignore[no-untyped-def]
    """Return the address of the buckets `[rounds, 64]` of a page's keys."""
    place = group * weights.lsh[ROUNDS] * PAGE * 2
    return layer_address(batch, chunk, page, layer) + batch.codes_start + place


@subroutine(error_model="numpy")
def kappa(weights, batch, chunk, page, layer, head):  # type: ignore[no-untyped-def]
    """Return the sums `[64]` of a head in page `page` of a chunk, and what they are relative to
    `[1]`.
    """
    memory = layer_address(batch, chunk, page, layer)
    sums = memory + weights.groups * weights.page_width * PAGE * 4
    starts = sums + weights.heads * PAGE * 4
    return (
        carray(pointer(sums + head * PAGE * 4), (PAGE,), np.float32),
        carray(pointer(starts + head * 8), (1,), np.float64),
    )
