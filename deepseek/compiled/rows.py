"""Rows of activations: norm and quantisation, and the barrier of the threads.

A quantised row of G groups is stored as 64 G bytes, G scales in fp32 and G corrections in int32
(see `kernels/int8_layout.py`).
"""

import platform
import sys

import numpy as np
from numba import carray, types

from deepseek.compiled.vector import arrive, look, rotate_and_round
from deepseek.kernels import int8_layout
from deepseek.kernels.int8_layout import GROUP
from deepseek.kernels.numba import openmp
from deepseek.kernels.numba.primitives import pointer, thread_count
from deepseek.kernels.numba.subroutine import subroutine

# System call number of Linux's futex, which sleeps until a number in memory changes. On other
# systems a waiting thread only yields.
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
_WAIT = 0
_WAKE = 1
_ALL = 1 << 30
_syscall = openmp.external("syscall", types.int64(*[types.int64] * 7))
_yield = openmp.external("sched_yield", types.int32())

row_bytes = subroutine(int8_layout.row_bytes)
# Number of spins at the barrier, about 40 microseconds, before the thread gives up its core. The
# threads drift apart within a stage; sleeping within that time costs more than it saves, because a
# thread that slept is late at the next barrier too, where the other one then sleeps.
SPINS = 40_000


@subroutine(error_model="numpy")
def barrier(counter):  # type: ignore[no-untyped-def]
    """Wait until every thread has called this.

    `counter` is the address of two int64s, initially 0: the number of arrivals, and the number of
    sleeping threads. Waits are short while cores are free, so a thread spins for a while before it
    sleeps. Each sleeper decrements the count itself. If the last thread to arrive reset it instead,
    it could do so late and miss a thread that already sleeps at the next barrier, which nobody
    would wake.
    """
    threads = thread_count()
    sleepers = counter + 8
    before = arrive(counter, 1)
    goal = (before // threads + 1) * threads
    if before + 1 == goal and look(sleepers) > 0:
        _syscall(_FUTEX, counter, _WAKE, _ALL, 0, 0, 0)
    spins = 0
    seen = look(counter)
    while seen < goal:
        spins += 1
        if spins > SPINS and _FUTEX:
            arrive(sleepers, 1)
            # Returns at once if the number is no longer `seen`, so that no wake-up is missed.
            _syscall(_FUTEX, counter, _WAIT, seen, 0, 0, 0)
            arrive(sleepers, -1)
        elif spins > SPINS:
            _yield()
        seen = look(counter)


@subroutine(error_model="numpy")
def floats(address, *shape):  # type: ignore[no-untyped-def]
    """Return the fp32 numbers at an address as an array of the given shape."""
    return carray(pointer(address), shape, np.float32)


@subroutine(error_model="numpy")
def round_group(x, row, group, groups):  # type: ignore[no-untyped-def]
    """Quantise the 64 numbers at address `x` as group `group` of the row at address `row`."""
    scale = row + GROUP * groups + 4 * group
    rotate_and_round(x, row + GROUP * group, scale, scale + 4 * groups)


@subroutine(error_model="numpy")
def put_attended(weights, work, r, head, attended):  # type: ignore[no-untyped-def]
    """Quantise the output of a head as part of row `r`'s input of the output projection."""
    width = weights.width
    if width % GROUP:  # a group of 64 holds parts of two heads: `round_attended` quantises them
        work.attended[r, head * width : (head + 1) * width] = attended[:width]
        return
    for part in range(width // GROUP):
        x = attended.ctypes.data + part * GROUP * 4
        place = head * (width // GROUP) + part
        round_group(x, work.attended_rows[r], place, weights.heads * width // GROUP)


@subroutine(fastmath=True, error_model="numpy")
def norm_row(x, weight, eps, out):  # type: ignore[no-untyped-def]
    """Set `out` to the RMS-normalised `x` (see `model/norm.py`)."""
    total = np.float32(0)
    for d in range(len(weight)):
        total += x[d] * x[d]
    factor = np.float32(1) / np.sqrt(total / np.float32(len(weight)) + eps)
    for d in range(len(weight)):
        out[d] = x[d] * factor * weight[d]
