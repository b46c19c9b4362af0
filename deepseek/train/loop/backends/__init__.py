"""Where parameters live and who else trains: one process, or many that each hold a part (FSDP2
under `torchrun`).

The loop speaks to `Backend` alone; `current` returns the one that this process was started for.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from deepseek.checkpoint import store
from deepseek.train.loop.optim import Weights, no_room_for

B = TypeVar("B")


class Backend:
    """One of W processes that train together; this one is alone, W = 1.

    Attributes:
        main: whether this process writes metrics, plots and results.
        world: W.
    """

    main = True
    world = 1

    def shard(self, module: nn.Module, parts: list[nn.Module]) -> None:
        """Spread the parameters of `module` over the processes; those of each of `parts` are
        gathered as one.
        """

    def share(self, batch: B) -> B:
        """Return this process's rows of a batch that all processes have."""
        return batch

    def weigh(self, tokens: int) -> tuple[float, int]:
        """Return the factor that makes the mean over processes of their mean losses the mean over
        all targets, and how many targets there are in all.
        """
        return 1.0, tokens

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over processes."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return flag

    def barrier(self) -> None:
        """Wait for all processes."""

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a parameter of which this process holds a part, complete."""
        return tensor

    def save(self, folder: Path, state: Weights, meta: dict[str, Any]) -> None:
        """Write a checkpoint that is either whole or absent; raise `TrainError` if the disk is
        full.
        """
        with store.disk_full_explained(no_room_for(folder)):
            store.save_state(folder, state.tensors(), meta)

    def load(self, folder: Path, state: Weights) -> dict[str, Any]:
        """Restore a checkpoint, whatever the number of processes that wrote it, and return its
        meta.
        """
        tensors, meta = store.load_state(folder)
        state.restore(tensors)
        return meta


SINGLE = Backend()


@contextmanager
def current() -> Iterator[Backend]:
    """Give the backend of this process: FSDP2 where `torchrun` started it, else one process
    alone.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield SINGLE
        return
    from deepseek.train.loop.backends.fsdp2 import joined

    with joined() as backend:
        yield backend
