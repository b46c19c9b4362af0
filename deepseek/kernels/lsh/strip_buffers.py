"""Memory of a thread: the keys of a list, their gradients, and the small matrices of a strip."""

import numpy as np

from deepseek.kernels.lsh.bf16_product import whole_blocks
from deepseek.kernels.lsh.bf16_scores import work_space
from deepseek.kernels.lsh.product import COLUMNS, ROWS
from deepseek.kernels.numba.by_dtype import by_dtype
from deepseek.kernels.numba.subroutine import subroutine


@subroutine
def _list_buffers(keys, most, heads_per_group, rounds):  # type: ignore[no-untyped-def]
    """Allocate buffers for the keys of a list and for their gradients."""
    laid = (
        keys,
        np.empty(most, np.int32),
        np.empty((most, heads_per_group), np.float64),
        np.empty((rounds - 1, most), np.int32),
    )
    grads = (
        np.empty(keys.shape, np.float32),
        np.empty(keys.shape, np.float32),
        np.empty((most, heads_per_group), np.float32),
    )
    return laid, np.zeros_like(keys), grads


@subroutine
def _full_buffers(_key, most, longest, _unit_rows, heads_per_group, width, rounds, _tiled):  # type: ignore[no-untyped-def]
    """Allocate buffers for the keys of a list, for their gradients, and for the small matrices of a
    strip.
    """
    narrow = (2 * longest + ROWS, COLUMNS)
    small = (
        np.zeros((width, COLUMNS), np.float32),
        np.empty((COLUMNS, width), np.float32),
        np.empty(narrow, np.float32),
        np.empty(narrow, np.float32),
    )
    return (
        *_list_buffers(np.zeros((most, width), np.float32), most, heads_per_group, rounds),
        small,
    )


@subroutine
def _half_buffers(_key, most, longest, unit_rows, heads_per_group, width, rounds, tiled):  # type: ignore[no-untyped-def]
    """Allocate the same for bf16."""
    keys = np.zeros((most, whole_blocks(width)), np.uint16)
    small = work_space(longest, most, unit_rows, width, tiled)
    return (*_list_buffers(keys, most, heads_per_group, rounds), small)


buffers = by_dtype(_full_buffers, _half_buffers)
"""`buffers(key, most, longest, unit_rows, heads_per_group, width, rounds, tiled)` returns the
buffers for up to `most` keys of a list, strips of windows up to `longest`, and units of `unit_rows`
queries.
"""
