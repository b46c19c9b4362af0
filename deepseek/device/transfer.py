"""Copies from the host to a device that do not wait for each other."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device.

    A copy to a CUDA device goes through page-locked memory and overlaps with the device's work.

    Args:
        tensor: tensor on any device.
        device: where it is needed.
        dtype: dtype of the result; None: that of the tensor.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)
