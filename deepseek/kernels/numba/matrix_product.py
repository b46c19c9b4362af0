"""Matrix products inside a kernel, by torch's own BLAS on the calling thread."""

import numpy as np
from numba import njit, types

from deepseek.kernels.numba import openmp

openmp.has_sgemm()
_sgemm = openmp.external("sgemm_", types.void(*[types.voidptr] * 13))


@njit
def product(a, transpose_a, b, transpose_b, out, kept=0):  # type: ignore[no-untyped-def]
    """Set out `[n, m]` to `kept` times itself plus the matrix product of a and b, each transposed
    on request.

    The elements of a row lie side by side. BLAS thinks column by column: to it, the transpose of
    `out` is the product of b and a in their transposes.
    """
    depth = a.shape[0] if transpose_a else a.shape[1]
    strides = (b.strides[0] // 4, a.strides[0] // 4, out.strides[0] // 4)
    sizes = np.array(
        [out.shape[1], out.shape[0], depth, strides[0], strides[1], strides[2]], np.int32
    )
    kinds = np.array(
        [84 if transpose_b else 78, 84 if transpose_a else 78], np.uint8
    )  # the letters T and N
    scales = np.array([1, kept], np.float32)
    _sgemm(
        kinds.ctypes,
        kinds[1:].ctypes,
        sizes.ctypes,
        sizes[1:].ctypes,
        sizes[2:].ctypes,
        scales.ctypes,
        b.ctypes,
        sizes[3:].ctypes,
        a.ctypes,
        sizes[4:].ctypes,
        scales[1:].ctypes,
        out.ctypes,
        sizes[5:].ctypes,
    )
