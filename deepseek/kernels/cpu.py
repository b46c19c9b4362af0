"""What this processor is fast at."""

from functools import cache

import torch


@cache
def has_fast_bfloat16() -> bool:
    """Whether bf16 matrix products run on AMX or AVX-512 BF16 units; emulated, they are about 8x slower than fp32."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return the dtype in which matrix products are fastest on `device` without leaving the range of fp32."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if has_fast_bfloat16() else torch.float32
