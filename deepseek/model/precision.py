"""Mixed precision: the dtype of a model's matrix products.

Trained weights stay in fp32 whatever that dtype.
"""

import torch
from transformers import PreTrainedModel

from deepseek.device.choose import fast_dtype


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype of a model's matrix products under `autocast`.

    It is the model's attribute `compute_dtype`, which `from_pretrained(dtype=...)` sets, or the
    fastest dtype on the model's device.
    """
    chosen: torch.dtype | None = getattr(model, "compute_dtype", None)
    return fast_dtype(model.device) if chosen is None else chosen


def autocast(model: PreTrainedModel, *, cached: bool = True) -> torch.autocast:
    """Return the context in which to run a model in mixed precision; it does nothing for fp32.

    Args:
        model: model to run.
        cached: keep the cast weights until the context ends. Weights cast without gradients must
            not be reused in a following training pass. Default: True.
    """
    dtype = compute_dtype(model)
    enabled = dtype is not torch.float32
    return torch.autocast(model.device.type, dtype=dtype, enabled=enabled, cache_enabled=cached)
