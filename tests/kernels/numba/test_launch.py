"""Kernels in several processes: the one that compiles a kernel, and those that load it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numba import types
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target

from deepseek.kernels.numba.launch import _KernelCache, _KernelCompiler, kernel_sources, unpack
from deepseek.kernels.numba.subroutine import subroutine

KERNEL = """
import numpy as np
from numba import njit
from deepseek.kernels.numba.launch import compiled, launch, unpack
from deepseek.compiled.rows import norm_row

@njit(error_model="numpy")
def run(x, weight, out):
    for r in range(len(x)):
        norm_row(x[r], weight, np.float32(1e-5), out[r])
    for r in range(len(x)):
        norm_row(out[r], weight, np.float32(1e-3), x[r])

def kernel(kinds):
    return compiled(lambda data: run(*unpack(data, kinds)))

if __name__ == "__main__":
    import torch
    import kernel as own
    torch.manual_seed(0)
    x, weight = torch.randn(64, 576), torch.rand(576)
    out = torch.empty_like(x)
    torch.set_num_threads(1)
    launch(own.kernel, x, weight, out)
    print(out.double().sum().item().hex(), x.double().sum().item().hex())
"""


SHARED = """
import numpy as np
from numba import njit
from deepseek.kernels.numba.launch import compiled, unpack

@njit(error_model="numpy")
def largest_first(keys, count, ids):
    for j in range(count):
        best = 0
        for e in range(len(keys)):
            if keys[e] > keys[best]:
                best = e
        ids[j] = best
        keys[best] = -np.inf

@njit(error_model="numpy")
def run(keys, ids):
    largest_first(keys, len(ids), ids)
    largest_first(keys[2:].copy(), min(2, len(keys)), np.empty(2, np.int64))

def kernel(kinds):
    return compiled(lambda data: run(*unpack(data, kinds)))

if __name__ == "__main__":
    import kernel as own
    own.kernel("f1 l1")
    keys, ids = np.arange(8, dtype=np.float32), np.zeros(4, np.int64)
    own.run(keys[::-1], ids)  # of another type than in the kernel, so compiled after it
    print(ids.tolist())
"""


def run(program: Path) -> str:
    """Return the output of a program that caches compiled code beside it."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(program.parent / "cache")}
    command = [sys.executable, str(program)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_the_process_that_compiles_a_kernel_computes_what_those_that_load_it_do(
    tmp_path: Path,
) -> None:
    program = tmp_path / "kernel.py"
    program.write_text(KERNEL)

    compiled = run(program)
    assert list(tmp_path.rglob("*.nbc"))
    assert run(program) == compiled


def test_functions_of_a_kernel_can_be_called_in_the_process_that_compiled_it(
    tmp_path: Path,
) -> None:
    program = tmp_path / "kernel.py"
    program.write_text(SHARED)
    assert run(program) == "[0, 1, 2, 3]\n"


def test_a_change_in_any_kernel_file_compiles_kernels_anew(tmp_path: Path) -> None:
    """Numba's own cache key covers only the kernel's file, not those of the functions it calls."""

    def kernel(data: Any) -> None:
        del data

    codegen = cpu_target.target_context.codegen()
    keys = [_KernelCache(kernel, source)._index_key((), codegen) for source in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]
    (tmp_path / "inner").mkdir()
    file = tmp_path / "inner" / "helper.py"
    file.write_text("one = 1\n")
    before = kernel_sources.__wrapped__(tmp_path)
    file.write_text("one = 2\n")
    assert kernel_sources.__wrapped__(tmp_path) != before


@subroutine(error_model="numpy")
def first(values: Any) -> Any:
    return values[0] if len(values) else np.float32(0)


@subroutine(error_model="numpy")
def add_firsts(x: Any, out: Any) -> None:
    scratch = np.empty(8, np.float32)
    for r in range(len(x)):
        scratch[:] = x[r, :8]
        out[r] += first(scratch[r % 8 :])


def test_counts_of_references_that_cancel_out_are_removed() -> None:
    """Numba's optimiser recognises the reference-counting functions by name, so kernels must keep
    these names.

    Reference counts of an array that several threads slice cost the step a third of its speed.
    """

    def kernel(data: Any) -> None:
        add_firsts(*unpack(data, "f2 f1"))

    signature = ((types.CPointer(types.int64),), types.void)
    function = CFunc(kernel, signature, locals={}, options={}, pipeline_class=_KernelCompiler)
    function.compile()
    code = function._library.get_llvm_str()
    assert not re.search(r"NRT_\w+\.closed", code)
    assert len(re.findall(r"call \w+ @NRT_incref", code)) <= 3  # 6 if none is removed
