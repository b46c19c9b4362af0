"""Everything that decides how a run goes on, as tensors and JSON."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deepseek.errors import TrainError
from deepseek.train.optim import load_optimizer_tensors, optimizer_tensors


@dataclass(frozen=True)
class TrainingState:
    """What training changes.

    Attributes:
        parameters: by name.
        buffers: further tensors, by name.
        optimizer: of the parameters.
    """

    parameters: dict[str, nn.Parameter]
    buffers: Mapping[str, Tensor]
    optimizer: torch.optim.AdamW

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it, PyTorch's random states among them, under one flat naming."""
        return {
            **{f"parameter.{name}": parameter for name, parameter in self.parameters.items()},
            **{f"buffer.{name}": value for name, value in self.buffers.items()},
            **{f"optimizer.{name}": v for name, v in optimizer_tensors(self.optimizer, self.parameters).items()},
            **{f"random.{device}": state for device, state in _random_states().items()},
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put what `tensors` returned back where it was."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
        for name, value in self.buffers.items():
            value.copy_(tensors[f"buffer.{name}"])
        load_optimizer_tensors(self.optimizer, self.parameters, _below(tensors, "optimizer."))
        _restore_random(_below(tensors, "random."))


@contextmanager
def disk_full_explained(message: str) -> Iterator[None]:
    """Turn a lack of space within the block into a `TrainError` with this message."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise TrainError(message) from error


def no_room_for(folder: Path) -> str:
    """Return what to say where a checkpoint does not fit the disk."""
    return (
        f"The disk of {folder.parent} is full, the checkpoint {folder.name} was not written; the one before is intact, "
        "so free some space and run the same command."
    )


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _random_states() -> dict[str, Tensor]:
    """Return the states of PyTorch's generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_random(states: dict[str, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def _is_disk_full(error: Exception) -> bool:
    """Whether writing failed for lack of space; safetensors reports it by message alone."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "os error 28" in str(error)
