"""Attention inputs of a frozen model, layer by layer, and which keys its queries attend to."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.kernels.lsh.intervals import Windows
from deepseek.model.attention.full import AttentionInputs
from deepseek.model.passes import begin
from deepseek.model.transformer import DeepSeekModel


@dataclass(frozen=True)
class HeadInputs:
    """Inputs of one layer's heads on one text.

    Attributes:
        plain_query_HTK: queries before positions are applied, as hashes read them.
        plain_key_GTK: keys before positions are applied.
        query_HTK: queries of the attention.
        key_GTK: keys of the attention.
        value_GTK: values of the attention.
    """

    plain_query_HTK: Tensor
    plain_key_GTK: Tensor
    query_HTK: Tensor
    key_GTK: Tensor
    value_GTK: Tensor


@torch.no_grad()
def stream_layers(model: DeepSeekModel, ids_RT: Tensor) -> Iterator[tuple[int, list[HeadInputs]]]:
    """Yield each layer's index and its attention inputs on R texts of T tokens.

    All texts pass through the layers together, so that each block runs once and only one layer's
    inputs are in memory. `model` must have full attention.
    """
    steps = [begin(model, ids_T[None].to(model.device)) for ids_T in ids_RT]
    for layer in range(len(model.layers)):
        for step in steps:
            step.run_to(layer)
        yield layer, [_of_one_text(step.attention_inputs()) for step in steps]


def _of_one_text(inputs: AttentionInputs) -> HeadInputs:
    parts = (
        inputs.plain_query_BHTK,
        inputs.plain_key_BGTK,
        inputs.query_BHTK,
        inputs.key_BGTK,
        inputs.value_BGTK,
    )
    return HeadInputs(*(part[0].float() for part in parts))


def attention_scores(inputs: HeadInputs, at_N: Tensor) -> Tensor:
    """Return causal attention scores `[H, N, S]` of the queries at positions `at_N`."""
    key_HTK = _per_head(inputs.key_GTK, inputs.query_HTK)
    scores_HNS = inputs.query_HTK[:, at_N] @ key_HTK.mT * inputs.query_HTK.shape[-1] ** -0.5
    return scores_HNS.masked_fill_(
        torch.arange(key_HTK.shape[1], device=at_N.device) > at_N[:, None], -torch.inf
    )


def near_keys(at_N: Tensor, length: int, windows: Windows) -> Tensor:
    """Return True `[N, S]` at keys in the local window or among the sinks, which are visible
    whatever buckets are probed.
    """
    keys_S = torch.arange(length, device=at_N.device)
    age_NS = at_N[:, None] - keys_S
    return (age_NS >= 0) & ((age_NS < windows.local) | (keys_S < windows.sinks))


def recent_in_bucket(codes_GS: Tensor, at_N: Tensor, windows: Windows) -> Tensor:
    """Return True `[G, N, S]` at the `windows.bucket` latest keys of each bucket, before the local
    window.

    Sinks are excluded. This is the candidate rule of `kernels/lsh/reference.py` for all buckets at
    once; tests compare the two.
    """
    keys_S = torch.arange(codes_GS.shape[1], device=codes_GS.device)
    in_bucket_GSC = torch.nn.functional.one_hot(codes_GS, windows.num_buckets)
    in_bucket_GSC[:, : windows.sinks] = 0
    count_GSC = in_bucket_GSC.cumsum(1)
    rank_GS = count_GSC.gather(2, codes_GS[..., None])[..., 0]
    oldest_near_N = at_N - windows.local
    count_GNC = count_GSC[:, oldest_near_N.clamp(min=0)]
    count_GNS = count_GNC.gather(2, codes_GS[:, None].expand(-1, len(at_N), -1))
    old_NS = (keys_S <= oldest_near_N[:, None]) & (keys_S >= windows.sinks)
    return (rank_GS[:, None] > count_GNS - windows.bucket) & old_NS


def bucket_mass(weights_HNS: Tensor, codes_GS: Tensor, recent_GNS: Tensor) -> Tensor:
    """Return the attention `[H, N, C]` of each query to the reachable keys of every bucket."""
    reached_HNS = weights_HNS * _per_head(recent_GNS, weights_HNS)
    codes_HNS = _per_head(codes_GS, weights_HNS)[:, None].expand_as(reached_HNS)
    mass_HNC = weights_HNS.new_zeros(*weights_HNS.shape[:2], int(codes_GS.max()) + 1)
    return mass_HNC.scatter_add_(2, codes_HNS, reached_HNS)


def _per_head(part_G: Tensor, like_H: Tensor) -> Tensor:
    """Repeat a key/value head's tensor for each of its query heads."""
    return part_G.repeat_interleave(like_H.shape[0] // part_G.shape[0], 0)
