"""Read the tensors of a pack whose header has been checked."""

import math
from typing import BinaryIO

import torch
from torch import Tensor

from deepseek.errors import PackError
from deepseek.packs.container import DAMAGED, Header, check_table
from deepseek.packs.manifest import DtypeName, TensorSpec

DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def read_tensors(file: BinaryIO, header: Header, specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
    """Read the tensors of a pack. They share one buffer.

    Args:
        file: the open pack, at its first tensor.
        header: its header.
        specs: dtype and shape of each tensor that the manifest calls for.

    Raises:
        PackError: the header does not fit `specs` (see `check_table`), or the file changes while it
            is read.
    """
    offsets = check_table(header, specs)
    data = bytearray(header.data_size)
    if file.readinto(data) != header.data_size:  # type: ignore[attr-defined]
        raise PackError(f"it changed while it was read; {DAMAGED}")
    return {
        name: torch.frombuffer(
            data, dtype=DTYPES[dtype], offset=offsets[name], count=math.prod(shape)
        ).view(shape)
        for name, (dtype, shape) in specs.items()
    }
