"""The experts of a mixture when each has many tokens, in one parallel region.

The slots, sorted by expert, are cut into equal shares, one a thread; so threads finish together however uneven the
experts' loads are. A thread takes its share piece by piece through gather, product, activation and product, all in its
own cache, calling torch's BLAS on one thread. Calling torch's operators instead would start and join all threads at
each of them.
"""

from functools import cache

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from deepseek.kernels import openmp
from deepseek.kernels.few_tokens import ELEMENT, barrier, pointer, share, sigmoid, sorted_slots, widen

PIECE = 256  # rows that a thread takes at once: gathered rows and projections stay in a cache of a megabyte or two

openmp.has_sgemm()
_sgemm = openmp.external("sgemm_", types.void(*[types.voidptr] * 13))


@njit
def product(a, transpose_a, b, transpose_b, out, kept=0):  # type: ignore[no-untyped-def]
    """Set out `[n, m]` to `kept` times itself plus the matrix product of a and b, either transposed if so said.

    The elements of a row lie side by side. BLAS thinks column by column: to it, the transpose of `out` is the product
    of b and a in their transposes.
    """
    depth = a.shape[0] if transpose_a else a.shape[1]
    strides = (b.strides[0] // 4, a.strides[0] // 4, out.strides[0] // 4)
    sizes = np.array([out.shape[1], out.shape[0], depth, strides[0], strides[1], strides[2]], np.int32)
    kinds = np.array([84 if transpose_b else 78, 84 if transpose_a else 78], np.uint8)  # the letters T and N
    scales = np.array([1, kept], np.float32)
    _sgemm(
        kinds.ctypes, kinds[1:].ctypes, sizes.ctypes, sizes[1:].ctypes, sizes[2:].ctypes, scales.ctypes, b.ctypes,
        sizes[3:].ctypes, a.ctypes, sizes[4:].ctypes, scales[1:].ctypes, out.ctypes, sizes[5:].ctypes,
    )  # fmt: skip


@njit
def wide(matrix, buffer):  # type: ignore[no-untyped-def]
    """Return `matrix` as fp32 in `buffer`."""
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            buffer[i, j] = widen(matrix[i, j])
    return buffer


@njit(fastmath=True)
def _piece(x, gate_up, down, tokens, weights, proj, rows, hidden, out, start, stop):  # type: ignore[no-untyped-def]
    """Rows start to stop - 1 of the sorted slots, all of one expert."""
    width, count = down.shape[1], stop - start
    for j in range(count):
        rows[j] = x[tokens[start + j]]
    product(rows[:count], False, gate_up, True, proj[:count])
    for j in range(count):
        weight = weights[start + j]
        for f in range(width):
            gate = proj[j, f]
            hidden[j, f] = weight * proj[j, width + f] * gate * sigmoid(gate)
    product(hidden[:count], False, down, True, out[start:stop])


@njit
def _share_of_slots(x, gate_up, down, tokens, weights, ends, proj, out, saved):  # type: ignore[no-untyped-def]
    first, last = share(ends[len(ends) - 1])
    rows, hidden = np.empty((PIECE, x.shape[1]), np.float32), np.empty((PIECE, down.shape[2]), np.float32)
    own = np.empty((PIECE, gate_up.shape[1]), np.float32)
    wide_up, wide_down = np.empty(gate_up.shape[1:], np.float32), np.empty(down.shape[1:], np.float32)
    start = first
    for e in range(len(ends)):
        stop = min(ends[e], last)
        if stop > start:
            up, low = wide(gate_up[e], wide_up), wide(down[e], wide_down)
        while start < stop:
            end = min(start + PIECE, stop)
            target = proj[start:end] if saved else own
            _piece(x, up, low, tokens, weights, target, rows, hidden, out, start, end)
            start = end


@njit(fastmath=True)
def combine(out, order, used, y, num_slots):  # type: ignore[no-untyped-def]
    """Add up each token's rows of `out`, this thread's tokens only."""
    place = np.full(len(order), -1, np.int64)
    for s in range(used):
        place[order[s]] = s
    first, last = share(len(y))
    for n in range(first, last):
        y[n] = 0
        for a in range(num_slots):
            s = place[n * num_slots + a]
            if s >= 0:
                y[n] += out[s]


@njit
def _run(x, gate_up, down, ids, slot_weights, y, proj, out, saved):  # type: ignore[no-untyped-def]
    ends = np.empty(len(down), np.int64)
    order, tokens, weights = sorted_slots(ids, slot_weights, ends)
    _share_of_slots(x, gate_up, down, tokens, weights, ends, proj, out, saved)
    barrier()
    combine(out, order, ends[len(ends) - 1], y, ids.shape[1])


def _kernel(element):  # type: ignore[no-untyped-def]
    @cfunc(types.void(types.CPointer(types.int64)), cache=True)
    def kernel(data):  # type: ignore[no-untyped-def]
        a = carray(data, 14)
        n, d, f, e, k, saved = a[8], a[9], a[10], a[11], a[12], a[13] != 0
        _run(
            carray(pointer(a[0]), (n, d), np.float32), carray(pointer(a[1]), (e, 2 * f, d), element),
            carray(pointer(a[2]), (e, d, f), element), carray(pointer(a[3]), (n, k), np.int64),
            carray(pointer(a[4]), (n, k), np.float32), carray(pointer(a[5]), (n, d), np.float32),
            carray(pointer(a[6]), (n * k, 2 * f), np.float32), carray(pointer(a[7]), (n * k, d), np.float32), saved,
        )  # fmt: skip

    return kernel.address


@cache
def _address(dtype: torch.dtype) -> int:
    return int(_kernel(ELEMENT[dtype]))


def forward(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor, proj_SP: Tensor | None
) -> Tensor:
    """See `few_tokens.forward`; without `proj_SP` the projections are not kept."""
    (num_tokens, hidden_size), (num_experts, _, width) = x_ND.shape, down_EDF.shape
    y_ND, out_SD = torch.empty_like(x_ND), x_ND.new_empty(ids_NA.numel(), hidden_size)
    kept = x_ND if proj_SP is None else proj_SP  # any address will do for what is not written
    tensors = (x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA, y_ND, kept, out_SD)
    sizes = [num_tokens, hidden_size, width, num_experts, ids_NA.shape[1], int(proj_SP is not None)]
    openmp.parallel(_address(gate_up_E2FD.dtype), [t.data_ptr() for t in tensors] + sizes)
    return y_ND
