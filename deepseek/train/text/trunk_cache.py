"""Cache of the frozen trunk below an expert.

An expert whose first layer is L changes nothing before the feed-forward part of block L. The
residual stream that enters this part is computed once per packed row and stored on disk. Further
passes read it, so that training costs only the layers above and the head. The first pass reads the
cache too, so that every epoch, and a resumed run, sees the same numbers.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek.checkpoint.store import disk_full_explained, read_json, write_json
from deepseek.data.text.loader import Batch, RowLoader
from deepseek.device.memory import free_memory
from deepseek.device.transfer import to_device
from deepseek.errors import CheckpointError
from deepseek.model.language_model import LanguageModel
from deepseek.model.precision import autocast
from deepseek.train.loop.packed import begin_rows

DEVICE_SHARE = 0.25
"""Largest share of an accelerator's free memory for the copy of a cache."""

ROWS_PER_COPY = 64
"""Rows that are copied to an accelerator at once."""

Stream = Callable[[Batch], Tensor]
"""Function that computes, or reads from a cache, the residual stream `[B, T, D]` of a batch."""


@torch.no_grad()
def run_trunk(model: LanguageModel, layer: int, batch: Batch) -> Tensor:
    """Return the residual stream `[B, T, D]` after the attention of `layer`, unaffected by its
    experts.

    Args:
        model: model to run, in its compute dtype.
        layer: first layer that has an expert.
        batch: packed rows of T tokens.
    """
    with autocast(model):
        step = begin_rows(model, batch)
        step.run_to(layer)
        return step.attend()


class TrunkCache:
    """Residual streams `[T, D]` of packed rows in a folder with `key.json`, `hidden.bin` and
    `done.bin`.

    Filling may be interrupted at any time: a row is marked as done only once it is on disk.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        row_ids: NDArray[np.int64],
        length: int,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        """Open the cache in `folder`, or start an empty one if its key or rows differ.

        Args:
            folder: folder of the cache.
            key: cache key as JSON values: what the numbers depend on, besides rows, shape and
                dtype.
            row_ids: rows to cache.
            length: tokens per row.
            width: width of the residual stream.
            dtype: dtype on disk.
        """
        self.folder = folder
        self.row_ids = row_ids
        self.dtype = dtype
        self.shape = (len(row_ids), length, width)
        self._slots = {int(row): slot for slot, row in enumerate(row_ids)}
        identity = {
            **key,
            "rows": row_ids.tolist(),
            "length": length,
            "width": width,
            "dtype": str(dtype),
        }
        if not self._holds(identity):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "hidden.bin").touch()
            (folder / "done.bin").write_bytes(bytes(len(row_ids)))
            write_json(folder / "key.json", identity)
        self.done = np.fromfile(folder / "done.bin", dtype=np.bool_)
        self._resident: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the complete cache on disk in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def fill(
        self,
        loader: RowLoader,
        compute: Callable[[Batch], Tensor],
        rows: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Compute and store the missing rows.

        Args:
            loader: gives the rows by id.
            compute: returns the residual stream `[B, T, D]` of a batch.
            rows: rows per batch.
            progress: called with the rows done and their total.

        Raises:
            TrainError: the disk is full; rows already written stay valid.
        """
        missing = np.flatnonzero(~self.done)
        for start in range(0, len(missing), rows):
            slots = missing[start : start + rows]
            stream_BTD = compute(loader.rows(self.row_ids[slots]))
            with disk_full_explained(
                f"The disk of {self.folder} is full "
                f"({self.num_bytes / 1e6:,.0f} MB are needed for the trunk cache); "
                "free some space and run the same command, or lower the number of tokens."
            ):
                self._write(slots, stream_BTD)
            progress(int(self.done.sum()), len(self.done))

    def place(self, device: torch.device) -> None:
        """Keep a copy of the cache on an accelerator, if it fits `DEVICE_SHARE` of its free memory.

        A larger one stays on the host; `read` then returns host tensors, and the trainer copies
        each batch through page-locked memory.

        Args:
            device: the device that trains; the CPU needs no copy.
        """
        if device.type == "cpu" or self.num_bytes > DEVICE_SHARE * free_memory(device):
            return
        self._resident = torch.empty(self.shape, dtype=self.dtype, device=device)
        for start in range(0, len(self.row_ids), ROWS_PER_COPY):
            part = slice(start, start + ROWS_PER_COPY)
            self._resident[part] = to_device(self.read_slots(part), device)

    def read(self, row_ids: Tensor) -> Tensor:
        """Return the residual streams `[B, T, D]` of these rows in the cache's dtype."""
        slots = np.array([self._slots[int(row)] for row in row_ids])
        if self._resident is not None:
            return self._resident[to_device(torch.from_numpy(slots), self._resident.device)]
        return self.read_slots(slots)

    def read_slots(self, slots: NDArray[np.intp] | slice) -> Tensor:
        """Return the residual streams `[B, T, D]` at these places of the file, on the host."""
        rows, length, width = self.shape
        shape = (rows, length, width * self.dtype.itemsize)  # bytes, as NumPy has no bfloat16
        stored = np.memmap(self.folder / "hidden.bin", np.uint8, mode="r", shape=shape)
        return torch.from_numpy(np.array(stored[slots])).view(self.dtype)

    def _holds(self, identity: dict[str, Any]) -> bool:
        try:
            same = read_json(self.folder / "key.json") == identity
        except CheckpointError:
            return False
        done = self.folder / "done.bin"
        # An interrupted deletion leaves some of the files.
        if not (same and done.is_file() and (self.folder / "hidden.bin").is_file()):
            return False
        return done.stat().st_size == self.shape[0]

    def _write(self, slots: NDArray[np.intp], stream_BTD: Tensor) -> None:
        """Write rows, then mark them as done.

        Plain writes raise an error on a full disk, where a memory map would kill the process.
        """
        rows = stream_BTD.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        with open(self.folder / "hidden.bin", "r+b") as file:
            for slot, row in zip(slots, rows, strict=True):
                file.seek(int(slot) * row.nbytes)
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.done[slots] = True
        with open(self.folder / "done.bin", "r+b") as file:
            file.write(self.done.tobytes())
