"""Resolve names of devices and dtypes, for every call that runs a model."""

import re

import torch

from deepseek.device.cpu import has_fast_bfloat16, has_float16
from deepseek.device.names import DEVICE, DEVICES
from deepseek.errors import ConfigError, DeviceError, shown
from deepseek.registry import nearest

CPU = torch.device("cpu")

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """Return a device that exists on this machine.

    Args:
        name: "auto", "cpu", "cuda" (the current GPU), "cuda:N" or "mps", or a torch device. "auto"
            is the accelerator that PyTorch finds, else the CPU. It is never "mps", where some of
            our operations have no kernel yet.

    Raises:
        ConfigError: the name is unknown.
        DeviceError: there is no such device.
    """
    if isinstance(name, torch.device) and name.type not in ("cpu", "cuda", "mps"):
        return name  # a backend that this module does not know, such as the meta device
    if isinstance(name, torch.device) and name.type != "cuda":
        name = name.type  # there is one of them, with or without its index
    text = str(name) if isinstance(name, str | torch.device) else shown(name)
    if not re.fullmatch(DEVICE, text):
        raise ConfigError(f"device {shown(name)} is unknown; {nearest(text, DEVICES)}.")
    kind, _, index = text.partition(":")
    if kind == "auto":
        return _accelerator()
    if kind == "cuda":
        return _cuda(int(index) if index else None)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("Device mps needs a Mac with Apple silicon; take cpu, or auto.")
    return torch.device(kind)


def choose_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in on a device.

    Args:
        name: "auto" or None for `fast_dtype`; "float32", "bfloat16" or "float16"; or a torch dtype,
            which is returned as it is.
        device: the device.

    Raises:
        ConfigError: the name is unknown.
        DeviceError: the device does not support the dtype.
    """
    if isinstance(name, torch.dtype) and name.is_floating_point:
        return name
    if name is None or (isinstance(name, str) and name == "auto"):
        return fast_dtype(device)
    if not isinstance(name, str) or name not in DTYPES:
        word = shown(name)
        raise ConfigError(f"dtype {word} is unknown; {nearest(word, ['auto', *DTYPES])}.")
    if name == "float16" and device.type == "cpu" and not has_float16():
        raise DeviceError(
            "dtype float16 is not supported on this processor; take float32 or bfloat16, or a GPU."
        )
    return DTYPES[name]


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return the dtype with the fastest matrix products on `device` among those with the range of
    fp32.

    Args:
        device: a torch device; default "cpu".
    """
    device = torch.device(device)
    if device.type == "cpu":
        is_fast = has_fast_bfloat16()
    elif device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        is_fast = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        is_fast = True
    return torch.bfloat16 if is_fast else torch.float32


def _accelerator() -> torch.device:
    """Return the accelerator that PyTorch finds, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return CPU
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _cuda(index: int | None) -> torch.device:
    """Return a CUDA device; None: the current one."""
    if not torch.cuda.is_available():
        cuda_version = torch.version.cuda or getattr(torch.version, "hip", None)
        cause = "none is found" if cuda_version else "this build of PyTorch has no CUDA support"
        raise DeviceError(f"Device cuda needs a GPU, and {cause}; take cpu, or auto.")
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        raise DeviceError(
            f"Device cuda:{index} does not exist; the last one is cuda:{count - 1}, so take that, "
            "or auto."
        )
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)
