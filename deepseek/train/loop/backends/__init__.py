"""Backends: train in a single process, or in many that shard the parameters (FSDP2 with
`torchrun`).

The loop only uses the interface `Backend`; `current` returns the backend of this process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepseek.checkpoint import store
from deepseek.train.loop.optim import Weights, no_room_for

B = TypeVar("B")


class Backend:
    """One of W training processes. This base class is the single-process backend, W = 1.

    Attributes:
        main: whether this process writes metrics, plots and results.
        world: W.
    """

    main = True
    world = 1

    def shard(self, module: nn.Module, parts: list[nn.Module], dtype: torch.dtype) -> None:
        """Shard the parameters of `module`; each of `parts` is gathered as one unit, in `dtype`."""

    def share(self, batch: B) -> B:
        """Return this process's rows of a global batch.

        Args:
            batch: dataclass of tensors with at least W rows, so that each process has some.
        """
        return batch

    def weigh(self, tokens: int) -> tuple[float, int]:
        """Return the weight of this process's mean loss, and the number of targets of all
        processes.

        With these weights, the mean over processes equals the mean over all targets.
        """
        return 1.0, tokens

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over processes."""
        return values

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process."""
        return flag

    def barrier(self) -> None:
        """Wait for all processes."""

    def whole(self, tensor: Tensor) -> Tensor:
        """Return the full tensor of a sharded parameter."""
        return tensor

    def save(self, folder: Path, state: Weights, meta: dict[str, Any]) -> None:
        """Write a checkpoint atomically.

        Raises:
            TrainError: the disk is full.
        """
        with store.disk_full_explained(no_room_for(folder)):
            store.save_state(folder, state.tensors(), meta)

    def load(self, folder: Path, state: Weights) -> dict[str, Any]:
        """Restore a checkpoint, regardless of how many processes wrote it, and return its
        metadata.

        Args:
            folder: folder of the checkpoint.
            state: tensors to restore. Moments that the checkpoint lacks are reset, random states
                stay.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        if not (folder / "state.safetensors").is_file():  # FSDP2 writes one file per process
            from deepseek.train.loop.backends.sharded import load_sharded

            return load_sharded(folder, state, no_dist=True)
        tensors, meta = store.load_state(folder)
        state.restore(tensors)
        return meta


SINGLE = Backend()


@contextmanager
def current(device: str) -> Iterator[Backend]:
    """Yield this process's backend: FSDP2 if `torchrun` started it, else the single-process one.

    Args:
        device: name of the device. With FSDP2, "auto" and "cuda" give each process a GPU of its
            own.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield SINGLE
        return
    from deepseek.train.loop.backends.fsdp2 import joined

    with joined(device) as backend:
        yield backend
