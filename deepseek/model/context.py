"""What all layers of one forward pass share."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from deepseek.errors import ConfigError
from deepseek.model.config import ModelConfig
from deepseek.model.kv_cache import KVCache
from deepseek.model.positions import PreparedPositions


class Armed(Protocol):
    """Plugged experts that take part in one forward pass (see `model/experts`)."""

    def apply(self, layer_idx: int, x_BTD: Tensor, y_BTD: Tensor, ctx: "ForwardContext") -> Tensor: ...


@dataclass
class ForwardContext:
    """Built once per forward pass and handed to every block.

    Attributes:
        positions: maps queries and keys to positioned ones.
        position_ids_BT: position of each token in its own document.
        token_mask_BT: False at padding; None when every token is real.
        mask_B1TS: True where a query may attend to a key; None when plain causal attention says it all.
        window_mask_B1TS: the same for layers with a sliding window; None when no layer has one.
        document_ids_BT: which document of a packed row a token belongs to; None when rows hold one document each.
        cache: keys and values of past tokens, or None.
        armed: plugged experts that take part, or None when not one is armed.
        router_stats: one entry per mixture-of-experts layer, appended as the layers run.
    """

    positions: PreparedPositions
    position_ids_BT: Tensor
    token_mask_BT: Tensor | None = None
    mask_B1TS: Tensor | None = None
    window_mask_B1TS: Tensor | None = None
    document_ids_BT: Tensor | None = None
    cache: KVCache | None = None
    armed: Armed | None = None
    router_stats: list[Any] = field(default_factory=list)


def past_length(cache: KVCache | None) -> int:
    """Number of tokens that `cache` already holds."""
    return int(cache.get_seq_length()) if cache is not None else 0


def resolve_positions(
    batch: int, length: int, past: int, attention_mask: Tensor | None, position_ids: Tensor | None, device: torch.device
) -> Tensor:
    """Return positions `[B, T]`: as given, else counted over real tokens, else counted from the cache's length."""
    if position_ids is not None:
        return position_ids.expand(batch, length)
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(past, past + length, device=device).expand(batch, length)


def real_tokens(attention_mask: Tensor | None, total: int) -> Tensor | None:
    """Return the padding mask `[B, S]` as booleans, or None when there is no padding.

    Raises:
        ConfigError: the mask is not `[B, S]` over past and new tokens.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != total:
        raise ConfigError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must be [batch, {total}], past and new tokens."
        )
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask


def document_ids(position_ids_BT: Tensor) -> Tensor | None:
    """Return document numbers `[B, T]` of packed rows, whose positions restart; None when no row is packed."""
    restarts = torch.diff(position_ids_BT, dim=-1, prepend=position_ids_BT[:, :1] - 1) != 1
    restarts[:, 0] = False
    return restarts.cumsum(-1) if bool(restarts.any()) else None


def attention_mask(
    length: int,
    past: int,
    real_BS: Tensor | None,
    documents_BT: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Return the boolean mask `[B or 1, 1, T, S]` of keys that a query may see, or None if causality alone decides."""
    plain = length == 1 or past == 0
    if real_BS is None and documents_BT is None and plain and (window is None or past + length <= window):
        return None
    queries = torch.arange(past, past + length, device=device)[:, None]
    keys = torch.arange(past + length, device=device)[None, :]
    mask = keys <= queries
    if window is not None:
        mask = mask & (queries - keys < window)
    mask = mask[None, None]
    if real_BS is not None:
        # A padding query sees itself alone, so that its softmax has one entry and no NaN arises.
        mask = (mask & real_BS[:, None, None, :]) | (keys == queries)
    if documents_BT is not None:
        mask = mask & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    return mask


def build_masks(
    config: ModelConfig,
    length: int,
    past: int,
    real_BS: Tensor | None,
    documents_BT: Tensor | None,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the masks for full and for sliding-window layers (see `ForwardContext`)."""
    full = attention_mask(length, past, real_BS, documents_BT, None, device)
    if config.sliding_window is None:
        return full, None
    return full, attention_mask(length, past, real_BS, documents_BT, config.sliding_window, device)
