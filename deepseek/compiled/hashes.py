"""Arguments of the compiled step for LSH attention: hashes and windows of the layers with it."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.compiled import abi
from deepseek.kernels.int8_layout import GROUP
from deepseek.model.attention.hash import LinearHash
from deepseek.model.attention.lsh import HashRounds, LshAttention, RandomHash
from deepseek.model.transformer import DeepSeekModel


def hashed_layers(model: DeepSeekModel) -> dict[int, LshAttention]:
    """Return the layers with LSH attention that is not exact."""
    found = {}
    for layer, block in enumerate(model.layers):
        for part in block.modules():
            if isinstance(part, LshAttention) and not part.exact:
                found[layer] = part
    return found


def unknown_hash(model: DeepSeekModel) -> str | None:
    """Return the class name of a hash that the step does not support; None if there is none."""
    for attention in hashed_layers(model).values():
        for part in _rounds(attention):
            if type(part) not in (LinearHash, RandomHash):
                return type(part).__name__
    return None


class PackedHashes:
    """The hashes of a model, and the numbers of its LSH attention.

    Args:
        model: a model that the compiled runner supports.

    Attributes:
        layers: layers with LSH attention.
        far_field: whether they have a far field.
        rounds: rounds of hashing; 0: no LSH attention.
        extents: sizes of the queries' codes under their names in `compiled/abi.py`.
        values: values of the buffers there.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        config = model.config
        layers = hashed_layers(model)
        rounds = {layer: _rounds(attention) for layer, attention in layers.items()}
        learned = any(isinstance(parts[0], LinearHash) for parts in rounds.values())
        maps = (config.num_attention_heads, config.num_key_value_heads) if learned else (1, 1)
        factor = (config.head_dim / (config.query_pre_attn_scalar or config.head_dim)) ** 0.5
        # Owns the memory, `[R, maps, K + 1, C]` of each layer.
        self._arrays = {
            layer: np.stack([_maps(part, factor, maps) for part in parts])
            for layer, parts in rounds.items()
        }
        numbers = [0] * abi.LSH_NUMBERS
        for attention in layers.values():
            windows = attention.windows
            numbers[abi.LOCAL] = windows.local
            numbers[abi.SINKS] = windows.sinks
            numbers[abi.WINDOW] = windows.bucket
            numbers[abi.FAR_FIELD] = int(windows.far_field)
            numbers[abi.ROUNDS] = windows.rounds
            numbers[abi.PROBES] = attention.probes
            numbers[abi.BUCKETS] = -(-windows.num_buckets // GROUP) * GROUP
            numbers[abi.QUERY_MAPS], numbers[abi.KEY_MAPS] = maps
        self.layers = tuple(layers)
        self.far_field = bool(numbers[abi.FAR_FIELD])
        self.rounds = numbers[abi.ROUNDS]
        self.extents = {
            "hashed_heads": config.num_attention_heads if layers else 0,
            "codes": numbers[abi.ROUNDS] * numbers[abi.PROBES],
        }
        addresses = {layer: array.ctypes.data for layer, array in self._arrays.items()}
        self.values: dict[str, Any] = {
            "hashes": [addresses.get(layer, 0) for layer in range(len(model.layers))],
            "lsh": numbers,
        }


def _rounds(attention: LshAttention) -> list[Any]:
    """Return the hash of each round."""
    layer_hash: Any = attention.hash
    return list(layer_hash) if isinstance(layer_hash, HashRounds) else [layer_hash]


def _maps(layer_hash: Any, factor: float, counts: tuple[int, int]) -> np.ndarray:
    """Return the maps from queries, then those from keys, to scores of buckets `[maps, K + 1, C]`.

    The last row is a bias. C is a multiple of 64; columns beyond the buckets score -inf.

    Args:
        layer_hash: the hash of one round.
        factor: factor on queries.
        counts: number of maps of queries and of keys.
    """
    if isinstance(layer_hash, LinearHash):
        query = (layer_hash.query_weight, layer_hash.query_bias)
        key = (layer_hash.key_weight, layer_hash.key_bias)
    else:
        weight_KC = layer_hash.directions_CK.float().mT
        query, key = (
            (weight_KC.expand(count, -1, -1), torch.zeros(count, weight_KC.shape[1]))
            for count in counts
        )
    parts: list[Tensor] = [query[0] * factor, query[1][:, None], key[0], key[1][:, None]]
    maps = torch.cat([torch.cat(parts[:2], 1), torch.cat(parts[2:], 1)]).float()
    missing = -maps.shape[2] % GROUP
    maps = F.pad(maps, (0, missing))
    if missing:
        maps[:, -1, -missing:] = -math.inf
    return maps.contiguous().numpy()
