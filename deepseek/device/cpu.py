"""Which dtypes this processor computes fast."""

import platform
from functools import cache
from pathlib import Path

import torch


@cache
def has_bfloat16() -> bool:
    """Whether the processor has instructions for bf16 products."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@cache
def has_fast_bfloat16() -> bool:
    """Whether bf16 matrix products are faster than fp32 ones; emulated, they are about 8x slower.

    They are faster with AMX, and with AVX-512 BF16 if both vector ports support it (AMD). Intel
    supports it on one of two ports, which gives 0.7 of the speed of fp32 (docs/log/kernels.md,
    2026-11-25).
    """
    return torch.cpu._is_amx_tile_supported() or (has_bfloat16() and "Intel" not in _vendor())


def _vendor() -> str:
    """Return a text that contains the name of the processor's vendor."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text()[:256] if cpuinfo.is_file() else platform.processor()


@cache
def has_float16() -> bool:
    """Whether the processor has instructions for fp16 products; emulation is unusably slow."""
    return bool(torch.cpu._is_amx_fp16_supported())
