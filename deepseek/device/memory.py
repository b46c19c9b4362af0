"""Memory of a device: free, peak, and out-of-memory errors.

For the CPU, the figures are those of this process and of the machine. Other devices are asked
through PyTorch's module for them (`torch.cuda`, `torch.mps`).
"""

import gc
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from deepseek.errors import DeviceError

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Files in which Linux states how much memory this process's container may use."""

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
"""Parts of the messages of PyTorch's allocators; only CUDA's error has a class of its own."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, so that times can be measured."""
    if device.type != "cpu":
        _module(device).synchronize()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: resident memory of this process on the CPU, allocated
    tensors on another device.
    """
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # kilobytes elsewhere
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return int(_module(device).max_memory_allocated(device))


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated, including those that PyTorch caches."""
    if device.type == "cpu":
        return min(int(psutil.virtual_memory().available), _container_memory())
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    module = _module(device)
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def total_memory() -> int:
    """Return the bytes of this machine's memory, or of those that the container of this process may
    use, if these are fewer.
    """
    return min(int(psutil.virtual_memory().total), _container_limit())


def _container_limit() -> int:
    """Return the bytes that the container of this process may use; a huge number if there is no
    limit.
    """
    try:
        return int((CONTROL_GROUP / "memory.max").read_text())
    except (OSError, ValueError):  # no control groups, or the limit "max"
        return sys.maxsize


def _container_memory() -> int:
    """Return how many of these bytes are free or hold files that can be read again."""
    try:
        used_bytes = int((CONTROL_GROUP / "memory.current").read_text())
        stat = (CONTROL_GROUP / "memory.stat").read_text()
    except (OSError, ValueError):
        return sys.maxsize
    files = re.search(r"^inactive_file (\d+)", stat, re.M)
    return _container_limit() - used_bytes + (int(files[1]) if files else 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device is used up."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in OUT_OF_MEMORY)


@contextmanager
def out_of_memory_explained(advice: str) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error into one sentence.

    Args:
        advice: the end of the sentence, what to do.

    Raises:
        DeviceError: the memory of the device is used up.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(f"The {out_of_memory(error)}; {advice}") from None


def out_of_memory(error: BaseException) -> str:
    """Return what PyTorch's out-of-memory error says, without its advice and a full stop."""
    return f"device is out of memory ({_size(error)})"


def release(device: torch.device) -> None:
    """Give memory that PyTorch only caches back to the device."""
    gc.collect()
    if device.type != "cpu":
        _module(device).empty_cache()


def _size(error: BaseException) -> str:
    """Return the part of PyTorch's message that names the sizes, without its advice."""
    sentences = " ".join(str(error).split()).split(". ")
    sentences_with_size = [sentence for sentence in sentences if "ried to allocate" in sentence]
    return (sentences_with_size or sentences)[0].rstrip(".")


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
