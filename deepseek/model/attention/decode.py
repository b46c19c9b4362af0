"""Decoding of many sequences at once: their attention in one call of a kernel.

The kernel reads the keys and values where the sequences' caches keep them (`ReservedLayer`), so no
step copies or pads the past. It runs on CPUs; elsewhere sequences are computed one after another.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepseek.kernels.bias.score_bias import ScoreBias
from deepseek.kernels.numba import openmp
from deepseek.model.context import ForwardContext
from deepseek.model.kv_cache import KVCache, ReservedLayer

if TYPE_CHECKING:
    from deepseek.kernels.decode_attention import Probes


def reserved_layers(
    key_1GRK: Tensor, value_1GRK: Tensor, sequences: Sequence[ForwardContext], layer_idx: int
) -> list[ReservedLayer] | None:
    """Return the cache layer of each sequence; None if the kernel cannot append to one of them.

    The kernel requires one dtype for the new keys and values and both memories.

    Args:
        key_1GRK, value_1GRK: the new keys and values.
        sequences: contexts of the sequences.
        layer_idx: index of the layer.
    """
    dtype = key_1GRK.dtype
    if key_1GRK.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    # Under autocast the tables of rotary positions leave keys in fp32, but not values.
    if value_1GRK.dtype != dtype:
        return None
    if openmp.runtime() is None:
        return None
    layers = []
    for sequence in sequences:
        cache = sequence.cache
        layer = cache.layers[layer_idx] if isinstance(cache, KVCache) else None
        memory = layer.memory(1) if isinstance(layer, ReservedLayer) else None
        if memory is None or any(part.dtype != dtype for part in memory):
            return None
        assert isinstance(layer, ReservedLayer)
        layers.append(layer)
    return layers


def scaled_queries(query_1HRK: Tensor, biases: Sequence[ScoreBias | None]) -> Tensor:
    """Return the queries `[1, H, R, K]` times their scale, divided by sqrt(K), in fp32."""
    query_1HRK = query_1HRK.float() * query_1HRK.shape[-1] ** -0.5
    scales = [bias.scale_BHT for bias in biases if bias is not None and bias.scale_BHT is not None]
    return query_1HRK * torch.cat(scales, dim=2)[..., None] if scales else query_1HRK


def tables(biases: Sequence[ScoreBias | None]) -> Tensor | None:
    """Return the biases by distance `[R, H, 32]`; None: there are none."""
    parts = [bias.table_BHTN for bias in biases if bias is not None and bias.table_BHTN is not None]
    return torch.cat(parts, dim=2)[0].transpose(0, 1) if parts else None


def decode(
    query_1HRK: Tensor,
    key_1GRK: Tensor,
    value_1GRK: Tensor,
    biases: Sequence[ScoreBias | None],
    layers: Sequence[ReservedLayer],
    window: int | None,
    probes: "Probes | None" = None,
    buckets: Sequence[tuple[int, int, int, int]] | None = None,
) -> Tensor:
    """Append one token to each sequence and return the attended values `[1, H, R, K]`.

    Args:
        query_1HRK, key_1GRK, value_1GRK: queries, keys and values of the new tokens.
        biases: bias of each sequence's scores, all of the same parts; None: no bias.
        layers: where the sequences keep keys and values.
        window: number of most recent keys to attend to; None: all.
        probes: buckets of LSH attention; None: none.
        buckets: addresses of each sequence's buckets (see `BucketCache.addresses`).
    """
    from deepseek.kernels.decode_attention import Memory, attend

    memories = []
    for index, (layer, bias) in enumerate(zip(layers, biases, strict=True)):
        memory = layer.memory(1)
        assert memory is not None
        layer.written(1)
        total = layer.get_seq_length()
        first = 0 if window is None else max(0, total - window)
        key_bias = None if bias is None else bias.key_BHS
        addresses = None if buckets is None else buckets[index]
        memories.append(Memory(*memory, total, first, key_bias, addresses))
    attended_RHK = attend(
        scaled_queries(query_1HRK, biases)[0].transpose(0, 1),
        key_1GRK[0].transpose(0, 1),
        value_1GRK[0].transpose(0, 1),
        tables(biases),
        memories,
        probes,
    )
    return attended_RHK.to(query_1HRK.dtype).transpose(0, 1)[None]
