"""Matrix products inside a kernel, with torch's own BLAS on the calling thread."""

import numpy as np
from numba import types

from deepseek.kernels.numba import openmp
from deepseek.kernels.numba.subroutine import subroutine

openmp.has_sgemm()
_sgemm = openmp.external("sgemm_", types.void(*[types.voidptr] * 13))


@subroutine
def product(a, transpose_a, b, transpose_b, out, kept=0):  # type: ignore[no-untyped-def]
    """Set out `[n, m]` to `kept` times itself plus the matrix product of a and b, each transposed
    on request.

    The elements of a row must be contiguous. BLAS is column-major: it sees the transpose of `out`
    as the product of the transposes of b and a.
    """
    depth = a.shape[0] if transpose_a else a.shape[1]
    strides = (b.strides[0] // 4, a.strides[0] // 4, out.strides[0] // 4)
    sizes = np.array(
        [out.shape[1], out.shape[0], depth, strides[0], strides[1], strides[2]], np.int32
    )
    # ASCII codes of BLAS's letters T and N.
    kinds = np.array([84 if transpose_b else 78, 84 if transpose_a else 78], np.uint8)
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
