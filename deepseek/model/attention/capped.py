"""Exact attention whose scores are capped (Gemma 2, arXiv:2408.00118, section 2).

Torch's `scaled_dot_product_attention` has no cap, so scores are computed by matrix products, for as
many queries at a time as `MAX_SCORES` allows. They are in fp32 whatever the dtype of the inputs and
of autocast, because rounding scores to bf16 would cost more precision than rounding the output.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_SCORES = 1 << 24
"""Maximum number of scores in memory: 64 MB in fp32."""


def soft_cap(values: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(values / cap), computed in fp32, in the dtype of `values`."""
    return (cap * torch.tanh(values.float() / cap)).to(values.dtype)


def capped_attention(
    query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, cap: float, mask_B1TS: Tensor | None
) -> Tensor:
    """Return the attention-weighted values `[B, H, T, K]`, in the dtype of the values.

    The backward pass computes the scores again.

    Args:
        query_BHTK: queries `[B, H, T, K]`.
        key_BGSK, value_BGSK: keys and values `[B, G, S, K]`; H is a multiple of G.
        cap: scores z, already divided by sqrt(K), are capped to cap * tanh(z / cap).
        mask_B1TS: True where a query may attend to a key, `[B, 1, T, S]`; None: causal, with the
            last query at the last key.
    """
    batch, heads, length, _ = query_BHTK.shape
    total = key_BGSK.shape[2]
    step = max(1, MAX_SCORES // (batch * heads * total))
    parts = []
    for first in range(0, length, step):
        queries = query_BHTK[:, :, first : first + step]
        if mask_B1TS is None:
            count = queries.shape[2]
            all_TS = torch.ones(count, total, dtype=torch.bool, device=query_BHTK.device)
            mask = all_TS.tril(total - length + first)[None, None]
        else:
            mask = mask_B1TS[:, :, first : first + step]
        arguments = (queries, key_BGSK, value_BGSK, cap, mask)
        if torch.is_grad_enabled() and queries.requires_grad:
            parts.append(checkpoint(_attend, *arguments, use_reentrant=False))
        else:
            parts.append(_attend(*arguments))
    return torch.cat(parts, dim=2)


def _attend(
    query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, cap: float, mask_B1TS: Tensor
) -> Tensor:
    with torch.autocast(query_BHTK.device.type, enabled=False):
        groups = key_BGSK.shape[1]
        query_BGRTK = query_BHTK.float().unflatten(1, (groups, -1)) * query_BHTK.shape[-1] ** -0.5
        scores_BGRTS = query_BGRTK @ key_BGSK.float()[:, :, None].mT
        scores_BGRTS = soft_cap(scores_BGRTS, cap).masked_fill(~mask_B1TS[:, :, None], -torch.inf)
        weights_BGRTS = scores_BGRTS.softmax(-1).to(value_BGSK.dtype)
        return (weights_BGRTS @ value_BGSK[:, :, None]).flatten(1, 2)
