"""Stock caches of several sequences as one batch, padded on the left, for decoding together."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from deepseek.runner import Chunk

JOINED = {
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
}
"""Classes of cache layers whose sequences can be joined. A model with another one decodes its
sequences one after another.
"""

STATES = ("conv_states", "recurrent_states")


def can_join(cache: Cache) -> bool:
    """Return whether caches like this one can be joined."""
    return {type(layer) for layer in cache.layers} <= JOINED


def similar_lengths(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Return chunks in groups, longest sequences first.

    Padded to its longest sequence, a group takes at most twice the memory of its sequences.
    """
    groups: list[list[Chunk]] = []
    longest = 0
    total = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.state.length, reverse=True):
        length = chunk.state.length
        if groups and (len(groups[-1]) + 1) * longest <= 2 * (total + length):
            groups[-1].append(chunk)
            total += length
        else:
            groups.append([chunk])
            longest = length
            total = length
    return groups


def join_layers(layers: Sequence[Any], longest: int) -> Any:
    """Return one layer's caches of several sequences as a batch, shorter ones padded on the left.

    Args:
        layers: the layer in the cache of each sequence.
        longest: length of the longest sequence.
    """
    batch = copy.copy(layers[0])
    if isinstance(batch, DynamicLayer) and batch.keys is not None:
        width = max(layer.keys.shape[-2] for layer in layers)
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in layers]
            padded = [pad(part, (0, 0, width - part.shape[-2], 0)) for part in parts]
            setattr(batch, name, torch.cat(padded))
    if isinstance(batch, DynamicSlidingWindowLayer):
        batch.cumulative_length = longest
    if isinstance(batch, LinearAttentionLayer):
        for name in STATES:
            parts = [getattr(layer, name) for layer in layers]
            joined = {key: _stacked([part[key] for part in parts]) for key in parts[0]}
            setattr(batch, name, joined)
    return batch


def split_layer(batch: Any, row: int, length: int) -> Any:
    """Return one layer's cache of the sequence in a row of a batch.

    Args:
        batch: the layer of the batch.
        row: row of the sequence.
        length: length of the sequence.
    """
    layer = copy.copy(batch)
    if isinstance(layer, DynamicLayer) and layer.keys is not None:
        for name in ("keys", "values"):
            whole = getattr(batch, name)
            padding = max(0, whole.shape[-2] - length)
            setattr(layer, name, whole[row : row + 1, :, padding:].clone())
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length
    if isinstance(layer, LinearAttentionLayer):
        for name in STATES:
            states = getattr(batch, name)
            parts = {key: _row(state, row) for key, state in states.items()}
            setattr(layer, name, parts)
    return layer


def padding_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return the attention mask `[B, S+1]` of sequences padded on the left, one new token each."""
    ends_B1 = torch.tensor(lengths, device=device)[:, None]
    slots_1S = torch.arange(max(lengths) + 1, device=device)[None]
    return (slots_1S >= max(lengths) - ends_B1).long()


def _stacked(states: list[Tensor | None]) -> Tensor | None:
    known = [state for state in states if state is not None]
    return torch.cat(known) if known else None


def _row(state: Tensor | None, row: int) -> Tensor | None:
    return None if state is None else state[row : row + 1].clone()
