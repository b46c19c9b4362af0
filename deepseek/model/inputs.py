"""Checks of the inputs of a forward pass: ids, embeddings, positions, labels and a foreign cache.

Integers of any dtype are accepted and returned as int64: torch does not index with other dtypes, or
they overflow where positions and ids are multiplied.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from deepseek import checks
from deepseek.errors import ConfigError

IGNORED = -100
"""Label of a token without a target, as in Hugging Face."""

MAX_POSITION = 2**31 - 1


def check_ids(input_ids: Tensor | None, vocab_size: int, weight: Tensor) -> Tensor:
    """Return ids `[B, T]` as int64; raise `ConfigError` unless all are in the vocabulary.

    Args:
        input_ids: what the caller passed.
        vocab_size: number of tokens of the vocabulary.
        weight: a weight of the model, on whose device the ids must be.
    """
    ids_BT = checks.tensor("input_ids", input_ids, "whole", dims=(2,))
    checks.same_device(input_ids=ids_BT, weights=weight)
    checks.within("input_ids", ids_BT, 0, vocab_size - 1, "token ids")
    return ids_BT.long()


def check_embeds(inputs_embeds: Tensor, weight_D: Tensor) -> None:
    """Raise `ConfigError` unless these are embeddings `[B, T, D]` of the model's dtype.

    Args:
        inputs_embeds: what the caller passed.
        weight_D: a weight of the model as wide as the residual stream.
    """
    checks.tensor("inputs_embeds", inputs_embeds, "real", dims=(3,), width=len(weight_D))
    if not torch.is_autocast_enabled(inputs_embeds.device.type):
        checks.alike(inputs_embeds=inputs_embeds, weights=weight_D)


def check_positions(position_ids: Tensor, batch: int, length: int, device: torch.device) -> Tensor:
    """Return positions as int64; raise `ConfigError` unless they are `[B, T]`, `[1, T]` or `[T]`,
    from 0 on.
    """
    checks.tensor("position_ids", position_ids, "whole", dims=(1, 2))
    if tuple(position_ids.shape) not in {(batch, length), (1, length), (length,)}:
        checks.shape("position_ids", position_ids, (batch, length), "[batch, seq]")
    if position_ids.device != device:
        raise ConfigError(
            f"position_ids are on {position_ids.device} and the tokens on {device}; move them to "
            "one device."
        )
    checks.within("position_ids", position_ids, 0, MAX_POSITION, "positions")
    return position_ids.long()


def check_cache(cache: Cache | None) -> None:
    """Raise `ConfigError` if a cache is static: its empty slots would be attended to."""
    if cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers):
        raise ConfigError(
            "A static cache returns slots that no token has filled yet; leave `cache` out, or pass "
            "a deepseek.model.KVCache or a DynamicCache."
        )


def check_labels(
    labels: Tensor, hidden_BTD: Tensor, vocab_size: int, logits_to_keep: int | Tensor
) -> Tensor:
    """Return target ids `[B, T]`, or -100 where there is none, as int64; raise `ConfigError` unless
    the labels are valid and all logits are computed.
    """
    if isinstance(logits_to_keep, Tensor) or logits_to_keep != 0:
        raise ConfigError("labels need the logits of all tokens; leave logits_to_keep out.")
    checks.tensor("labels", labels, "whole", dims=(2,))
    checks.shape("labels", labels, hidden_BTD.shape[:2], "[batch, seq]")
    checks.same_device(labels=labels, hidden_states=hidden_BTD)
    labels = labels.long()
    targets = labels.masked_fill(labels == IGNORED, 0)
    checks.within("labels", targets, 0, vocab_size - 1, "target ids (or -100, to ignore a token)")
    return labels
