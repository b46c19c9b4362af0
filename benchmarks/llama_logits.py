"""Run llama.cpp in another Python: predictions, and its own quantisation of GGUF files."""

import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PREDICT = """
import sys
import llama_cpp
import numpy as np

path, ids, out = sys.argv[1:]
rows = np.load(ids)
model = llama_cpp.Llama(
    model_path=path, n_ctx=512, n_batch=512, n_ubatch=512, logits_all=True, verbose=False
)
found = np.lib.format.open_memmap(out, "w+", np.float32, (*rows.shape, model.n_vocab()))
for number, row in enumerate(rows):
    model.reset()
    model.eval(row.tolist())
    found[number] = model.scores[: len(row)]
"""

QUANTISE = """
import ctypes
import sys
import llama_cpp

source, out, name = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + name)
failed = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
sys.exit(failed)
"""


def llama_predictions(python: Path, model: Path, ids_RT: np.ndarray, scratch: Path) -> Tensor:
    """Return llama.cpp's log probabilities `[R, T, V]` on rows of at most 512 tokens.

    Args:
        python: a Python that has llama-cpp-python.
        model: a GGUF file.
        ids_RT: token ids.
        scratch: a folder for the ids and the predictions.
    """
    ids, out = scratch / "ids.npy", scratch / f"{model.stem}.npy"
    np.save(ids, ids_RT)
    subprocess.run([python, "-c", PREDICT, model, ids, out], check=True)
    return torch.from_numpy(np.load(out)).log_softmax(-1)


def llama_quantise(python: Path, source: Path, out: Path, name: str) -> None:
    """Quantise a floating-point GGUF file with llama.cpp, without an importance matrix.

    Args:
        python: a Python that has llama-cpp-python.
        source: the file.
        out: the file to write.
        name: a format such as `Q4_0` or `Q4_K_M`.
    """
    subprocess.run(
        [python, "-c", QUANTISE, source, out, name], check=True, stderr=subprocess.DEVNULL
    )
