"""The context that all layers of one forward pass share: positions, masks, cache and experts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from deepseek.errors import ConfigError, shown
from deepseek.kernels.bias.score_bias import Visible
from deepseek.model.kv_cache import KVCache
from deepseek.model.moe.stats import RoutingDecision
from deepseek.model.positions import PreparedPositions
from deepseek.model.relevance_state import RelevanceState


class GateMemory(Protocol):
    """State of gates and relevance after the past tokens (see `KVCache` for the shapes)."""

    gate_state: dict[int, Tensor]
    relevance_state: RelevanceState | None


class GateContext(Protocol):
    """The part of a forward pass's context that armed experts read (see `ForwardContext`).

    A pass of an attached `transformers` model has only this part.
    """

    words_BTM: Tensor | None

    @property
    def position_ids_BT(self) -> Tensor: ...

    @property
    def token_mask_BT(self) -> Tensor | None: ...

    @property
    def document_ids_BT(self) -> Tensor | None: ...

    @property
    def input_ids_BT(self) -> Tensor | None: ...

    @property
    def cache(self) -> GateMemory | None: ...


class Armed(Protocol):
    """The armed experts of one forward pass (see `model/experts`)."""

    @property
    def adapts(self) -> bool: ...

    def apply(self, layer_idx: int, x_BTD: Tensor, y_BTD: Tensor, ctx: GateContext) -> Tensor: ...

    def adapt(self, site: str, x: Tensor, y: Tensor) -> Tensor: ...


@dataclass
class ForwardContext:
    """Context of one forward pass, built once and passed to every block.

    Attributes:
        positions: applies positions to queries and keys.
        position_ids_BT: position of each token in its document.
        past: number of tokens in the cache.
        window: width of the sliding window in tokens; None: no layer has one.
        real_BS: False at padding, over past and new tokens; None: no padding.
        document_ids_BT: document of each token in packed rows; None: one document per row.
        cache: keys and values of past tokens; None: no cache.
        input_ids_BT: ids of the new tokens, by which relevance is scored; None: the pass runs on
            embeddings, and every armed expert counts as relevant.
        armed: the armed experts; None: no expert is armed.
        words_BTM: relevance evidence of the tokens so far for each armed expert, in nats, computed
            by the first layer that needs it.
        router_stats: one entry per mixture-of-experts layer, appended as the layers run.
        routing: layer -> routing decisions of an earlier pass over the same tokens, to replay.
        sequences: contexts of the sequences that lie end to end in the only row, each with its own
            cache and experts (see `ragged.begin_ragged`); empty: every row is one text.
            Token-wise operations (norms, projections, feed-forward networks) treat the row like any
            other; operations across tokens take one of these contexts at a time.
    """

    positions: PreparedPositions
    position_ids_BT: Tensor
    past: int = 0
    window: int | None = None
    real_BS: Tensor | None = None
    document_ids_BT: Tensor | None = None
    cache: KVCache | None = None
    input_ids_BT: Tensor | None = None
    armed: Armed | None = None
    words_BTM: Tensor | None = None
    router_stats: list[Any] = field(default_factory=list)
    routing: Mapping[int, RoutingDecision] = field(default_factory=dict)
    sequences: "tuple[ForwardContext, ...]" = ()

    @property
    def length(self) -> int:
        """Number of new tokens."""
        return self.position_ids_BT.shape[1]

    @cached_property
    def lengths(self) -> list[int]:
        """Number of new tokens of each of `sequences`."""
        return [sequence.length for sequence in self.sequences]

    @cached_property
    def token_mask_BT(self) -> Tensor | None:
        """Mask `[B, T]` of the new tokens, False at padding; None: no padding."""
        return None if self.real_BS is None else self.real_BS[:, self.past :]

    @cached_property
    def places_BS(self) -> Tensor:
        """Index `[B or 1, S]` of each past and new token among the real tokens of its row."""
        if self.real_BS is not None:
            return self.real_BS.cumsum(-1)
        return torch.arange(self.past + self.length, device=self.position_ids_BT.device)[None]

    # A mask takes memory quadratic in the length, so it is built only if an attention reads it.
    @cached_property
    def mask_B1TS(self) -> Tensor | None:
        """Mask that is True where a query may attend to a key; None: causal attention suffices."""
        return attention_mask(*self._rows, None, self.position_ids_BT.device)

    @cached_property
    def window_mask_B1TS(self) -> Tensor | None:
        """The same mask for layers with a sliding window."""
        return attention_mask(*self._rows, self.window, self.position_ids_BT.device)

    @cached_property
    def visible(self) -> Visible:
        """The visibility of `mask_B1TS` in memory linear in the length."""
        return visible(*self._rows, None, self.position_ids_BT.device)

    @cached_property
    def window_visible(self) -> Visible:
        """The visibility of `window_mask_B1TS` in memory linear in the length."""
        return visible(*self._rows, self.window, self.position_ids_BT.device)

    @property
    def _rows(self) -> tuple[int, int, Tensor | None, Tensor | None]:
        return self.length, self.past, self.real_BS, self.document_ids_BT


def past_length(cache: KVCache | None) -> int:
    """Return the number of tokens that `cache` already holds; 0 without a cache."""
    return int(cache.get_seq_length()) if cache is not None else 0


def resolve_positions(
    batch: int,
    length: int,
    past: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Return the positions `[B, T]` of the new tokens.

    These are `position_ids` if passed. Otherwise they count the real tokens of the attention mask
    or, without a mask, continue from the length of the cache.
    """
    if position_ids is not None:
        return position_ids.expand(batch, length)
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(past, past + length, device=device).expand(batch, length)


def real_tokens(attention_mask: Tensor | None, batch: int, total: int) -> Tensor | None:
    """Return the padding mask `[B, S]` as booleans, or None if there is no padding.

    Args:
        attention_mask: 1 for real tokens and 0 for padding, `[B, S]`; None: no padding.
        total: number S of past and new tokens.

    Raises:
        ConfigError: the mask is not `[B, S]`.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != (batch, total):
        found = shown(getattr(attention_mask, "shape", attention_mask))
        raise ConfigError(
            f"attention_mask has shape {found}; it must be [{batch}, {total}], past and new tokens."
        )
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask


def document_ids(position_ids_BT: Tensor, real_BT: Tensor | None = None) -> Tensor | None:
    """Return the document number `[B, T]` of each token, or None if no row is packed.

    A new document starts at a token whose position is not that of the token before plus 1. If there
    is padding in between, which positions may or may not count, it starts where the position does
    not increase.

    Args:
        position_ids_BT: position of each token; ignored at padding.
        real_BT: False at padding; None: no padding.
    """
    if position_ids_BT.shape[1] == 1:
        return None  # fast path: called at every decoding step
    real_BT = torch.ones_like(position_ids_BT, dtype=torch.bool) if real_BT is None else real_BT
    slots_T = torch.arange(position_ids_BT.shape[1], device=position_ids_BT.device)
    latest_BT = slots_T.where(real_BT, -1).cummax(-1).values
    before_BT = pad(latest_BT[:, :-1], (1, 0), value=-1)  # slot of the real token before
    step_BT = position_ids_BT - position_ids_BT.gather(1, before_BT.clamp(min=0))
    restarts_BT = torch.where(before_BT == slots_T - 1, step_BT != 1, step_BT <= 0)
    restarts_BT = restarts_BT & real_BT & (before_BT >= 0)
    return restarts_BT.cumsum(-1) if bool(restarts_BT.any()) else None


def goes_on(position_ids_BT: Tensor, past: int, real_BS: Tensor | None) -> bool:
    """Return whether the first new token of each row continues the document in the cache; True if
    the cache is empty.

    Args:
        position_ids_BT: positions of the new tokens.
        past: number of tokens in the cache.
        real_BS: False at padding; None: no padding.
    """
    starts_B = position_ids_BT[:, 0] == 0
    if real_BS is not None:
        starts_B = starts_B & real_BS[:, past] & real_BS[:, :past].any(-1)
    return past == 0 or not bool(starts_B.any())


def attention_mask(
    length: int,
    past: int,
    real_BS: Tensor | None,
    documents_BT: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Return the boolean mask `[B or 1, 1, T, S]` of keys that a query may attend to.

    None means that causal attention without a mask gives the same result. Args: see `visible`.
    """
    plain = length == 1 or past == 0
    total = past + length
    if real_BS is None and documents_BT is None and plain and (window is None or total <= window):
        return None
    return visible(length, past, real_BS, documents_BT, window, device).mask(total)[:, None]


def visible(
    length: int,
    past: int,
    real_BS: Tensor | None,
    documents_BT: Tensor | None,
    window: int | None,
    device: torch.device,
) -> Visible:
    """Return the keys that each query may attend to, as one run of cache slots per query.

    A padding token attends to itself only: a softmax over no keys would be NaN.

    Args:
        length: number of queries.
        past: number of tokens before them.
        real_BS: False at padding; None: no padding.
        documents_BT: document number of each query; None: one document per row.
        window: width of the sliding window in tokens; None: no window.
        device: device of the result.
    """
    slots_1T = torch.arange(past, past + length, device=device)[None]
    first_BT = (
        torch.zeros_like(slots_1T) if window is None else (slots_1T - window + 1).clamp(min=0)
    )
    if documents_BT is not None:
        begins_BT = torch.diff(documents_BT, dim=-1, prepend=documents_BT[:, :1]) != 0
        first_BT = torch.maximum(first_BT, torch.where(begins_BT, slots_1T, 0).cummax(-1).values)
    if real_BS is None:
        return Visible(first_BT)
    first_BT = torch.maximum(first_BT, real_BS.int().argmax(-1, keepdim=True))
    first_BT = torch.where(real_BS[:, past:], first_BT, slots_1T)
    runs_B = (
        torch.diff(real_BS.int(), dim=-1, prepend=torch.zeros_like(real_BS[:, :1], dtype=torch.int))
        > 0
    ).sum(-1)
    # An exported graph cannot branch on values, so it always keeps the padding mask.
    if torch.compiler.is_exporting():
        return Visible(first_BT, real_BS)
    return Visible(first_BT, real_BS if bool((runs_B > 1).any()) else None)
