"""What the compiled step reads of LSH attention: hashes and windows of the layers that have it."""

from typing import Any

import numpy as np
import torch

from deepseek.model.attention.hash import LinearHash
from deepseek.model.attention.lsh import HashRounds, LshAttention, RandomHash
from deepseek.model.transformer import DeepSeekModel

Affine = tuple[torch.Tensor, torch.Tensor]
"""A hash of several heads, or of all alike if there is one: weights `[heads, K, C]` and biases
`[heads, C]`. The codes of a vector are the places of its largest scores.
"""


def hashed_layers(model: DeepSeekModel) -> dict[int, LshAttention]:
    """Return the layers with LSH attention that is not exact."""
    attentions: dict[int, Any] = {i: block.attention for i, block in enumerate(model.layers)}
    return {
        layer: attention
        for layer, attention in attentions.items()
        if isinstance(attention, LshAttention) and not attention.exact
    }


def unknown_hash(model: DeepSeekModel) -> str | None:
    """Return the name of a kind of hash that the step does not compute; None if there is none."""
    for attention in hashed_layers(model).values():
        for part in _rounds(attention.hash):
            if type(part) not in (LinearHash, RandomHash):
                return type(part).__name__
    return None


def hash_extents(model: DeepSeekModel) -> dict[str, int]:
    """Return the sizes of LSH attention under their names in `compiled/abi.py`; 0 without it."""
    layers = hashed_layers(model)
    if not layers:
        return dict.fromkeys(
            ("hashed", "rounds", "key_hashes", "query_hashes", "buckets", "probes", "hashed_heads"),
            0,
        )
    attention = next(iter(layers.values()))
    return {
        "hashed": len(layers),
        "rounds": attention.windows.rounds,
        "key_hashes": max(len(_affine(each.hash, "key")[0][0]) for each in layers.values()),
        "query_hashes": max(len(_affine(each.hash, "query")[0][0]) for each in layers.values()),
        "buckets": attention.windows.num_buckets,
        "probes": attention.probes,
        "hashed_heads": model.config.num_attention_heads,
    }


def hash_arrays(model: DeepSeekModel) -> dict[str, Any]:
    """Return the hashes and windows of all layers."""
    layers = hashed_layers(model)
    sizes = hash_extents(model)
    width = model.config.head_dim
    arrays: dict[str, Any] = {}
    for side in ("key", "query"):
        shape = (len(layers), sizes["rounds"], sizes[f"{side}_hashes"])
        weight = np.zeros((*shape, width, sizes["buckets"]), np.float32)
        bias = np.zeros((*shape, sizes["buckets"]), np.float32)
        for place, attention in enumerate(layers.values()):
            for r, (weight_HKC, bias_HC) in enumerate(_affine(attention.hash, side)):
                weight[place, r] = weight_HKC.detach().float().numpy()
                bias[place, r] = bias_HC.detach().float().numpy()
        arrays |= {f"{side}_hash": weight, f"{side}_hash_bias": bias}
    places = {layer: place for place, layer in enumerate(layers)}
    arrays["hash_of_layer"] = [places.get(layer, -1) for layer in range(len(model.layers))]
    config = model.config
    arrays["hash_windows"] = [config.lsh_local_window, config.lsh_sinks, config.lsh_bucket_window]
    arrays["far_field"] = int(bool(layers) and config.lsh_far_field)
    factor = (width / (config.query_pre_attn_scalar or width)) ** 0.5
    arrays["query_factor"] = np.array([factor], np.float32)
    return arrays


def _rounds(layer_hash: Any) -> list[Any]:
    """Return the hash of each round."""
    return list(layer_hash) if isinstance(layer_hash, HashRounds) else [layer_hash]


def _affine(layer_hash: Any, side: str) -> list[Affine]:
    """Return the hash of keys or of queries, for each round."""
    parts: list[Affine] = []
    for part in _rounds(layer_hash):
        if isinstance(part, LinearHash):
            parts.append((getattr(part, f"{side}_weight"), getattr(part, f"{side}_bias")))
        else:
            weight_1KC = part.directions_CK.T[None]
            parts.append((weight_1KC, torch.zeros(1, weight_1KC.shape[2])))
    return parts
