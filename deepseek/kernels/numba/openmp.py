"""Run numba kernels on torch's own OpenMP threads.

Numba has its own thread pool. With two pools, the idle workers of each one spin on the cores that
the other needs, which costs milliseconds per decoding step. So a kernel is compiled to a C
function, and the OpenMP runtime that torch has loaded calls it on its threads.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def runtime() -> ctypes.CDLL | None:
    """Return torch's OpenMP runtime, with its symbols made known to kernels; None if it cannot be
    reached.
    """
    import llvmlite.binding as llvm

    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        # Torch has loaded the library already, so this returns the same runtime, not a second one.
        library = ctypes.CDLL(str(path))
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
    """Whether kernels can call torch's own BLAS; makes its `sgemm_` known to them."""
    if runtime() is None:
        return False
    import llvmlite.binding as llvm

    try:
        blas = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        llvm.add_symbol("sgemm_", ctypes.cast(blas.sgemm_, ctypes.c_void_p).value)
    except (OSError, AttributeError):
        return False
    # MKL runs on one thread if it is called from a parallel region.
    return torch.backends.mkl.is_available()


def external(name: str, signature: Any) -> Any:
    """Return a C function of a loaded library for use in numba code.

    Args:
        name: its symbol.
        signature: its numba signature.
    """
    from numba.core import types

    return types.ExternalFunction(name, signature)


def parallel(address: int, arguments: list[int]) -> None:
    """Call a C function once on each of torch's threads, with the same arguments.

    Args:
        address: address of `void f(int64*)`.
        arguments: the integers that the pointer refers to.
    """
    library = runtime()
    assert library is not None
    data = (ctypes.c_int64 * len(arguments))(*arguments)
    library.GOMP_parallel(address, data, torch.get_num_threads(), 0)
