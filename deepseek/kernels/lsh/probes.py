"""Top-k selection of the buckets that each query probes."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from deepseek.kernels.numba.launch import compiled, launch, unpack
from deepseek.kernels.numba.primitives import share
from deepseek.kernels.numba.subroutine import subroutine


@subroutine
def _run(scores, codes):  # type: ignore[no-untyped-def]
    """Keep the best scores of each row sorted while scanning it.

    Most scores need only one comparison, with the last of the best.
    """
    probes = codes.shape[1]
    best = np.empty(probes, np.float32)
    first, last = share(len(scores))
    for n in range(first, last):
        best[:] = -np.inf
        codes[n] = 0
        least = best[probes - 1]
        for c in range(scores.shape[1]):
            score = scores[n, c]
            if score > least:
                p = probes - 1
                while p > 0 and score > best[p - 1]:
                    best[p] = best[p - 1]
                    codes[n, p] = codes[n, p - 1]
                    p -= 1
                best[p] = score
                codes[n, p] = c
                least = best[probes - 1]


@cache
def _kernel(kinds: str) -> int:
    return compiled(lambda data: _run(*unpack(data, kinds)))


def likeliest(scores: Tensor, probes: int) -> Tensor:
    """Compute `attention.likeliest` for fp32 scores on a CPU."""
    codes = torch.empty(*scores.shape[:-1], probes, dtype=torch.int64)
    launch(_kernel, scores.contiguous().view(-1, scores.shape[-1]), codes.view(-1, probes))
    return codes
