"""How much memory an engine needs, estimated from a checkpoint's headers before it is loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch

from deepseek.checkpoint.convert import is_routed, our_name
from deepseek.checkpoint.fingerprint import weight_files
from deepseek.checkpoint.stream import TensorHeader, headers
from deepseek.device.choose import CPU
from deepseek.device.memory import free_memory
from deepseek.errors import DeviceError
from deepseek.kernels.int8_layout import GROUP
from deepseek.model.quantised import SCALES, SUFFIXES, is_large

WORK_BYTES = 1 << 29
"""Compiled code and buffers of the step, and a block of weights while it is packed: 0.5 GiB."""

SCALE_BITS = 16 / GROUP


@dataclass(frozen=True)
class MemoryNeed:
    """Memory that an engine needs on the CPU, in bytes.

    Attributes:
        weights: the weights, as the engine computes with them.
        cache: budget of keys and values.
        work: everything else.
        experts: budget of the experts' weights; 0: without a budget they are not counted.
    """

    weights: int
    cache: int
    work: int = WORK_BYTES
    experts: int = 0

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.weights + self.cache + self.work + self.experts

    def __str__(self) -> str:
        experts = f"{_gib(self.experts)} for experts, " if self.experts else ""
        return (
            f"{_gib(self.total)} of memory ({_gib(self.weights)} for weights, {experts}"
            f"{_gib(self.cache)} for keys and values, {_gib(self.work)} for everything else)"
        )

    def check(self, name: str) -> None:
        """Check that this much memory is free.

        Args:
            name: the model, for the message.

        Raises:
            DeviceError: less is free.
        """
        free = free_memory(CPU)
        if self.total > free:
            raise DeviceError(
                f"{name} needs {self}, and {_gib(free)} are free; take a smaller cache of keys and "
                "values, a smaller model, or one that `deepseek quantize --bits 4` has written."
            )


def memory_need(folder: Path, dtype: torch.dtype, cache_bytes: int, packed: bool) -> MemoryNeed:
    """Return the memory that an engine needs for a model.

    Args:
        folder: the model's folder.
        dtype: dtype of weights that are not packed.
        cache_bytes: budget of keys and values.
        packed: whether the compiled runner packs the weights.

    Raises:
        CheckpointError: the weights are missing or damaged.
    """
    tensors = [header for file in weight_files(folder) for header in headers(file)]
    return MemoryNeed(sum(_bytes(header, dtype, packed) for header in tensors), cache_bytes)


def _bytes(header: TensorHeader, dtype: torch.dtype, packed: bool) -> int:
    """Return the bytes that a tensor of a checkpoint takes in the engine."""
    name = our_name(header.name)
    if name.endswith(SCALES):
        return 0  # counted with the values
    stored_bits = [bits for bits, suffix in SUFFIXES.items() if name.endswith(suffix)]
    bits = stored_bits[0] if stored_bits else 8
    elements = header.elements * 8 // bits if stored_bits else header.elements
    loaded_bytes = elements * dtype.itemsize
    quantised_bytes = int(elements * (bits + SCALE_BITS) / 8)
    if packed and not is_routed(name):
        is_packed = stored_bits or is_large(name, header.shape)
        return quantised_bytes if is_packed else loaded_bytes
    # A tensor that is loaded whole keeps its checkpoint's quantised matrix too, and routed experts
    # are packed in addition.
    copies = len(stored_bits) + int(packed)
    return loaded_bytes + copies * quantised_bytes


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB"
