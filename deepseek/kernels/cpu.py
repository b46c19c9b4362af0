"""What this processor is fast at."""

import platform
from functools import cache
from pathlib import Path

import torch


@cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies bf16 numbers itself."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@cache
def has_fast_bfloat16() -> bool:
    """Whether bf16 matrix products are faster than fp32 ones; emulated, they are about 8x slower.

    AMX makes them so, and so does AVX-512 BF16 where both vector ports have it (AMD); Intel has it
    on one of two, so that its products run at 0.7 of the speed of fp32 (docs/log/kernels.md,
    2026-11-25).
    """
    return torch.cpu._is_amx_tile_supported() or (has_bfloat16() and "Intel" not in _vendor())


def _vendor() -> str:
    """Return a text with the name of the processor's maker in it."""
    listed = Path("/proc/cpuinfo")
    return listed.read_text()[:256] if listed.is_file() else platform.processor()


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return the dtype in which matrix products are fastest on `device` without leaving the range
    of fp32.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if has_fast_bfloat16() else torch.float32
