"""Estimate what forward passes over packed rows will take, from one timed batch."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from deepseek.data import Batch
from deepseek.device.memory import peak_memory, synchronize
from deepseek.model.language_model import LanguageModel
from deepseek.train.loop.losses import held_out_loss


@dataclass(frozen=True)
class Estimate:
    """What some forward passes will take.

    Attributes:
        tokens: tokens in all passes.
        seconds: duration.
        memory: peak memory so far, in bytes: of this process on the CPU, of the tensors on another
            device.
        device: where they are computed.
    """

    tokens: int
    seconds: float
    memory: int
    device: torch.device

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens in all passes, about {self.seconds / 60:.1f} minutes on "
            f"{self.device}; memory {self.memory / 1e9:.1f} GB"
        )


def of_passes(model: LanguageModel, passes: Iterable[tuple[list[Batch], int]]) -> Estimate:
    """Return what forward passes will take; the first batch is computed twice.

    Args:
        model: the model, whose armed experts take part.
        passes: batches, and how often each of them is computed.
    """
    tokens = 0
    seen: list[Batch] = []
    for batches, count in passes:
        tokens += count * sum(batch.input_ids.numel() for batch in batches)
        seen += batches
    batch = seen[0]
    held_out_loss(model, [batch])
    synchronize(model.device)
    started = time.perf_counter()
    held_out_loss(model, [batch])
    synchronize(model.device)
    seconds = (time.perf_counter() - started) / batch.input_ids.numel() * tokens
    return Estimate(tokens, seconds, peak_memory(model.device), model.device)
