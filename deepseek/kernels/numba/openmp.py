"""Running a numba kernel on torch's own OpenMP threads.

Numba brings its own thread pool. Beside torch's, each pool's idle workers spin on the cores that
the other one needs, and a decoding step pays milliseconds for it. So a kernel is compiled to a C
function, which the OpenMP runtime that torch has loaded calls on its own threads.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def runtime() -> ctypes.CDLL | None:
    """Return the OpenMP runtime inside torch, or None where it cannot be reached."""
    import llvmlite.binding as llvm

    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        library = ctypes.CDLL(
            str(path)
        )  # already loaded by torch: this is the same runtime, not a second one
        if hasattr(library, "GOMP_parallel"):
            for name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
                llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
            library.GOMP_parallel.argtypes = [
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_uint,
                ctypes.c_uint,
            ]
            library.GOMP_parallel.restype = None
            return library
    return None


@cache
def has_sgemm() -> bool:
    """Whether torch's own BLAS can be called from kernels; makes its `sgemm_` known to them."""
    if runtime() is None:
        return False
    import llvmlite.binding as llvm

    try:
        blas = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        llvm.add_symbol("sgemm_", ctypes.cast(blas.sgemm_, ctypes.c_void_p).value)
    except (OSError, AttributeError):
        return False
    return (
        torch.backends.mkl.is_available()
    )  # MKL runs on one thread when it is called from a parallel region


def external(name: str, signature: Any) -> Any:
    """Return a C function of a loaded library for use inside numba code."""
    from numba.core import types

    return types.ExternalFunction(name, signature)


def parallel(address: int, arguments: list[int]) -> None:
    """Call the C function `void f(int64*)` at `address` once on each of torch's threads, with the
    same arguments.
    """
    library = runtime()
    assert library is not None
    data = (ctypes.c_int64 * len(arguments))(*arguments)
    library.GOMP_parallel(address, data, torch.get_num_threads(), 0)
