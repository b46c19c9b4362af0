"""What a job will take, as `--dry-run` prints it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Estimate:
    """What a job will take.

    Attributes:
        work: what it does or writes, with its size, for example "4,096 tokens in all passes".
        seconds: duration.
        memory: peak memory, in bytes: of this process on the CPU, of the tensors on another device.
        device: where it is computed.
    """

    work: str
    seconds: float
    memory: int
    device: torch.device

    def __str__(self) -> str:
        return (
            f"{self.work}, about {self.seconds / 60:.1f} minutes on {self.device}; "
            f"memory {self.memory / 1e9:.1f} GB"
        )
