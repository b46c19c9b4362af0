"""The loss on held-out text, as training and evaluation both report it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek.data.text.loader import Batch
from deepseek.kernels.cpu import fast_dtype
from deepseek.kernels.cross_entropy import IGNORED_LABEL, token_losses


@dataclass(frozen=True)
class HeldOut:
    """Mean loss in nats per predicted token, and over how many tokens."""

    loss: float
    tokens: int


def autocast(device: torch.device) -> torch.autocast:
    """Return the mixed precision in which matrix products are fastest on `device`; off where that is fp32."""
    dtype = fast_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


def run_below(model: Any, layer: int, batch: Batch) -> tuple[Tensor, Any]:
    """Return the stream `[B, T, D]` of packed rows that enters block `layer`, and the context of the pass."""
    input_ids_BT = batch.input_ids.to(model.device)
    hidden_BTD = model.embed_tokens(input_ids_BT)
    ctx = model.context(hidden_BTD, position_ids=batch.position_ids.to(model.device), input_ids=input_ids_BT)
    return model.run_layers(hidden_BTD, 0, layer, ctx), ctx


@torch.no_grad()
def row_losses(model: Any, batch: Batch) -> Tensor:
    """Return the exact loss `[B, T]` of every token of packed rows under `model` as it is armed, 0 where ignored."""
    with autocast(model.device):
        hidden_BTD = model.norm(run_below(model, len(model.layers), batch)[0])
    labels_BT = batch.labels.to(model.device)
    return token_losses(hidden_BTD.flatten(0, 1), model.lm_head.weight, labels_BT.flatten()).view_as(labels_BT)


def held_out_loss(model: Any, batches: Iterable[Batch]) -> HeldOut:
    """Return the exact mean loss over `batches`; plug, arm or force experts before."""
    return mean_loss((row_losses(model, batch), batch.labels) for batch in batches)


def mean_loss(parts: Iterable[tuple[Tensor, Tensor]]) -> HeldOut:
    """Return the mean over (losses, labels) parts, summed in double precision."""
    total, tokens = 0.0, 0
    for losses, labels in parts:
        total += float(losses.double().sum())
        tokens += int((labels != IGNORED_LABEL).sum())
    return HeldOut(total / max(1, tokens), tokens)
