"""Read and write a checkpoint tensor by tensor, so that memory never holds all of its weights."""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from weakref import finalize

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepseek.checkpoint.convert import is_computed, our_name
from deepseek.checkpoint.fingerprint import weight_files
from deepseek.checkpoint.store import write_json
from deepseek.errors import CheckpointError, shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes of safetensors that a checkpoint of ours can hold."""

PIECE = 1 << 24
"""Maximum bytes to read at once."""

FILE_BYTES = 1 << 29
"""Usual limit of the bytes to collect in memory for one file."""


class _Place(NamedTuple):
    """Where a tensor lies."""

    descriptor: int
    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorHeader(NamedTuple):
    """Header entry of a tensor in a safetensors file.

    Attributes:
        name: its name there.
        dtype: its dtype, as spelled there.
        shape: its shape.
        start: offset of its first byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def headers(path: Path) -> list[TensorHeader]:
    """Return the header entries of the tensors in a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt"):  # checks the whole header
            pass
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            table = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); download the model again.") from None
    table.pop("__metadata__", None)
    return [
        TensorHeader(
            name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in table.items()
    ]


class TensorFiles:
    """The tensors of a model folder, read from its files on demand, without those that are computed
    from the config.

    The files stay open: a checkpoint that is deleted or replaced meanwhile is read as it was.

    Args:
        folder: a model folder.
        post_norms: whether the model's blocks have four norms (see `our_name`); default False.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor has an unknown dtype.
    """

    def __init__(self, folder: Path, *, post_norms: bool = False) -> None:
        self._places: dict[str, _Place] = {}
        for path in weight_files(folder):
            descriptor = os.open(path, os.O_RDONLY)
            finalize(self, os.close, descriptor)
            for header in headers(path):
                if is_computed(header.name):
                    continue
                dtype = DTYPES.get(header.dtype)
                if dtype is None:
                    raise CheckpointError(
                        f"{path} holds the tensor {shown(header.name)} of dtype {header.dtype}, "
                        "which is not supported; use a checkpoint in bfloat16 or float32."
                    )
                place = _Place(descriptor, path, header.start, dtype, header.shape)
                self._places[our_name(header.name, post_norms=post_norms)] = place

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """Yield the tensors' names, as `our_name` gives them."""
        return iter(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._places[name].dtype

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return a tensor, or some rows of it, in memory of its own.

        Args:
            name: name of the tensor.
            first, last: the first row, and the one past the last; default: all rows.

        Raises:
            CheckpointError: the file has become shorter.
        """
        place = self._places[name]
        if not place.shape:
            return self._read(place, place.start, place.shape)
        count = place.shape[0]
        stop = count if last is None else min(last, count)
        row_bytes = math.prod(place.shape[1:]) * place.dtype.itemsize
        return self._read(
            place, place.start + first * row_bytes, (max(stop - first, 0), *place.shape[1:])
        )

    def _read(self, place: _Place, start: int, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=place.dtype)
        memory = tensor.reshape(-1).view(torch.uint8).numpy().data
        num_read = 0
        while num_read < len(memory):
            rest = memory[num_read : num_read + PIECE]
            count = os.preadv(place.descriptor, [rest], start + num_read)
            if not count:
                raise CheckpointError(f"{place.path} is cut short; download the model again.")
            num_read += count
        return tensor


class TensorWriter:
    """Writes tensors into the safetensors files of a folder as they come.

    Args:
        folder: the folder, which holds no weights yet.
        file_bytes: maximum bytes to collect in memory for one file, if no single tensor is
            larger; None: `FILE_BYTES`.

    Attributes:
        num_bytes: bytes of the tensors so far.
    """

    def __init__(self, folder: Path, file_bytes: int | None = None) -> None:
        self.num_bytes = 0
        self._folder = folder
        self._file_bytes = FILE_BYTES if file_bytes is None else file_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, by name, now or together with the next ones."""
        for name, tensor in tensors.items():
            if self._pending_bytes + tensor.nbytes > self._file_bytes:
                self._write()
            self._pending[name] = tensor.contiguous().cpu()
            self._pending_bytes += tensor.nbytes
            self.num_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, and the index if there are several files."""
        self._write()
        count = len(self._files)
        if count == 1:
            self._partial(1).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            file = f"model-{number:05}-of-{count:05}.safetensors"
            self._partial(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        write_json(
            self._folder / "model.safetensors.index.json",
            {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map},
        )

    def _write(self) -> None:
        if self._pending:
            self._files.append([*self._pending])
            save_file(self._pending, self._partial(len(self._files)), metadata={"format": "pt"})
        self._pending = {}
        self._pending_bytes = 0

    def _partial(self, number: int) -> Path:
        return self._folder / f"part-{number:05}.safetensors"
