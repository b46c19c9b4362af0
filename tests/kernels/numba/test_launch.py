import os
import subprocess
import sys
from pathlib import Path

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


def test_the_process_that_compiles_a_kernel_computes_what_those_that_load_it_do(
    tmp_path: Path,
) -> None:
    program = tmp_path / "kernel.py"
    program.write_text(KERNEL)

    def printed() -> str:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, str(program)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout

    compiled = printed()
    assert list(tmp_path.rglob("*.nbc"))
    assert printed() == compiled
