"""Held-out loss as training and evaluation report it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.data.text.loader import Batch
from deepseek.device.transfer import to_device
from deepseek.kernels.cross_entropy import IGNORED_LABEL, token_losses
from deepseek.model.language_model import LanguageModel, output_head
from deepseek.model.precision import autocast
from deepseek.train.loop.packed import begin_rows


@dataclass(frozen=True)
class HeldOut:
    """Mean loss in nats per predicted token, and the number of tokens."""

    loss: float
    tokens: int


@torch.no_grad()
def row_losses(model: LanguageModel, batch: Batch) -> Tensor:
    """Return the exact loss `[B, T]` of every token of packed rows, 0 for ignored labels.

    Armed experts take part.
    """
    with autocast(model):
        hidden_BTD = begin_rows(model, batch).finish()
    labels_BT = to_device(batch.labels, model.device)
    head = output_head(model)
    return token_losses(
        hidden_BTD.flatten(0, 1), head.weight_VD, labels_BT.flatten(), head.cap
    ).view_as(labels_BT)


def held_out_loss(model: LanguageModel, batches: Iterable[Batch]) -> HeldOut:
    """Return the exact mean loss over `batches`; plug, arm or force experts before."""
    return mean_loss((row_losses(model, batch), batch.labels) for batch in batches)


def mean_loss(parts: Iterable[tuple[Tensor, Tensor]]) -> HeldOut:
    """Return the mean over (losses, labels) parts, summed in double precision."""
    total = 0.0
    tokens = 0
    for losses, labels in parts:
        total += float(losses.cpu().double().sum())
        tokens += int((labels != IGNORED_LABEL).sum())
    return HeldOut(total / max(1, tokens), tokens)
