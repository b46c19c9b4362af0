"""The loss on held-out text, as training and evaluation both report it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.data.text.loader import Batch
from deepseek.kernels.cpu import fast_dtype
from deepseek.kernels.cross_entropy import IGNORED_LABEL, token_losses
from deepseek.model.transformer import DeepSeekModel
from deepseek.train.loop.packed import begin_rows


@dataclass(frozen=True)
class HeldOut:
    """Mean loss in nats per predicted token, and over how many tokens."""

    loss: float
    tokens: int


def autocast(device: torch.device) -> torch.autocast:
    """Return the mixed precision in which matrix products are fastest on `device`; off where that
    is fp32.
    """
    dtype = fast_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


@torch.no_grad()
def row_losses(model: DeepSeekModel, batch: Batch) -> Tensor:
    """Return the exact loss `[B, T]` of every token of packed rows under `model` as it is armed, 0
    where ignored.
    """
    with autocast(model.device):
        hidden_BTD = begin_rows(model, batch).finish()
    labels_BT = batch.labels.to(model.device)
    return token_losses(
        hidden_BTD.flatten(0, 1), model.lm_head.weight, labels_BT.flatten()
    ).view_as(labels_BT)


def held_out_loss(model: DeepSeekModel, batches: Iterable[Batch]) -> HeldOut:
    """Return the exact mean loss over `batches`; plug, arm or force experts before."""
    return mean_loss((row_losses(model, batch), batch.labels) for batch in batches)


def mean_loss(parts: Iterable[tuple[Tensor, Tensor]]) -> HeldOut:
    """Return the mean over (losses, labels) parts, summed in double precision."""
    total = 0.0
    tokens = 0
    for losses, labels in parts:
        total += float(losses.double().sum())
        tokens += int((labels != IGNORED_LABEL).sum())
    return HeldOut(total / max(1, tokens), tokens)
