"""Exact attention with a position bias that depends on query, distance and key.

    s[i, j] = scale[i] * q[i] . k[j] / sqrt(K) + table[i, bucket(i - j)] + key[j]

The bias consists of three tensors that grow linearly with the length. `reference_attention`
implements the formula. `biased_attention` computes it in tiles (`biased_tiles.py`), or in chunks of
queries where those are not available, and recomputes the scores in the backward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from deepseek.kernels.bias.distance import NUM_BUCKETS, distance_buckets
from deepseek.kernels.numba import openmp

CHUNK = 128
"""Number of queries whose scores the chunked path holds in memory at once."""


@dataclass(frozen=True)
class ScoreBias:
    """The bias that a position encoding adds to the scores of T queries and S keys.

    A part that is None adds nothing.

    Attributes:
        table_BHTN: value for each query and bucket of distance (N = 32, see `distance.py`).
        key_BHS: value for each key, in fp64, because only differences matter, and these are small
            relative to the sums over a long row.
        scale_BHT: factor of each query.
    """

    table_BHTN: Tensor | None = None
    key_BHS: Tensor | None = None
    scale_BHT: Tensor | None = None

    def scaled(self, query_BHTK: Tensor) -> Tensor:
        """Return the queries times `scale_BHT`."""
        return (
            query_BHTK
            if self.scale_BHT is None
            else query_BHTK * self.scale_BHT[..., None].to(query_BHTK.dtype)
        )

    def terms(self, query_BHTK: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return the table `[B, H, T, 32]`, at least in fp32, and the keys' terms `[B, H, S]` in
        fp64.

        Args:
            query_BHTK: the queries.
            total: number of keys S.
        """
        (batch, heads, length, _), zero = query_BHTK.shape, query_BHTK.new_zeros(())
        table = (zero if self.table_BHTN is None else self.table_BHTN).expand(
            batch, heads, length, NUM_BUCKETS
        )
        table = table.to(torch.promote_types(query_BHTK.dtype, torch.float32))
        return table, (zero if self.key_BHS is None else self.key_BHS).expand(
            batch, heads, total
        ).double()


@dataclass(frozen=True)
class Visible:
    """The keys that a query sees: its own slot and earlier ones, down to `first_BT`.

    Attributes:
        first_BT: slot of the first key that each query may see, at most its own; B is 1 if all rows
            are alike.
        real_BS: False at padding between real tokens, which is neither seen nor counted in
            distances; None if there is no such padding.
    """

    first_BT: Tensor
    real_BS: Tensor | None = None

    def mask(self, total: int) -> Tensor:
        """Return the mask `[B or 1, T, S]`, True where a query sees a key.

        Args:
            total: number of slots S; the queries have the last T of them.
        """
        slots_S = torch.arange(total, device=self.first_BT.device)
        query_T1 = torch.arange(total - self.first_BT.shape[1], total, device=self.first_BT.device)[
            :, None
        ]
        visible_BTS = (slots_S <= query_T1) & (slots_S >= self.first_BT[..., None])
        return (
            visible_BTS
            if self.real_BS is None
            else (visible_BTS & self.real_BS[:, None]) | (slots_S == query_T1)
        )


def reference_attention(
    query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, bias: ScoreBias, visible: Visible
) -> Tensor:
    """Return the attended values `[B, H, T, K]` in the dtype of the queries, with all scores in
    memory at once.

    Scores are in fp32 or wider, also under autocast: biases of far keys are large, and rounding
    their sums to bf16 would cost more than the differences between keys.

    Args:
        query_BHTK: queries of the last T slots.
        key_BGSK, value_BGSK: keys and values; H is a multiple of G.
        bias: the bias of the scores.
        visible: the keys that each query sees.
    """
    with torch.autocast(query_BHTK.device.type, enabled=False):
        repeats = query_BHTK.shape[1] // key_BGSK.shape[1]
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key_BGSK, value_BGSK))
        wide = torch.promote_types(query_BHTK.dtype, torch.float32)
        scores_BHTS = scaled_query(query_BHTK.to(wide), bias) @ key.to(wide).transpose(-1, -2)
        scores_BHTS = _biased(scores_BHTS, bias, visible)
        hidden = ~visible.mask(key.shape[2])[:, None]
        weights_BHTS = scores_BHTS.masked_fill(hidden, float("-inf")).softmax(-1)
        return (weights_BHTS.to(value.dtype) @ value).to(query_BHTK.dtype)


def _biased(scores_BHTS: Tensor, bias: ScoreBias, visible: Visible) -> Tensor:
    """Return the scores plus the terms of distances and keys."""
    length, total = scores_BHTS.shape[2:]
    if bias.table_BHTN is not None:
        slots_1S = torch.arange(total, device=scores_BHTS.device)[None]
        places_BS = slots_1S if visible.real_BS is None else visible.real_BS.cumsum(-1)
        bucket_BTS = distance_buckets(places_BS[:, -length:, None] - places_BS[:, None])
        scores_BHTS = scores_BHTS + bias.table_BHTN.gather(
            -1, bucket_BTS[:, None].expand_as(scores_BHTS)
        )
    if bias.key_BHS is not None:
        shifted_BHS = bias.key_BHS - bias.key_BHS[..., -1:].detach()
        scores_BHTS = scores_BHTS + shifted_BHS[:, :, None].to(scores_BHTS.dtype)
    return scores_BHTS


def scaled_query(query_BHTK: Tensor, bias: ScoreBias) -> Tensor:
    """Return the queries times `bias.scale_BHT`, divided by sqrt(K)."""
    return bias.scaled(query_BHTK) * query_BHTK.shape[-1] ** -0.5


def biased_attention(
    query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, bias: ScoreBias, visible: Visible
) -> Tensor:
    """Compute `reference_attention`, forward and backward, in memory linear in the length.

    Args:
        query_BHTK, key_BGSK, value_BGSK, bias, visible: see `reference_attention`.
    """
    parts = (query_BHTK, key_BGSK, value_BGSK)
    # The tiles compute in fp32. fp64 is used only by gradient checks; 16-bit numbers are converted,
    # which costs memory linear in the length.
    quick = (
        query_BHTK.device.type == "cpu" and query_BHTK.dtype != torch.double and openmp.has_sgemm()
    )
    if not quick or visible.real_BS is not None:
        return chunked_attention(*parts, bias, visible)
    attended: Tensor = _Tiled.apply(
        scaled_query(query_BHTK.float(), bias),
        key_BGSK.float(),
        value_BGSK.float(),
        *bias.terms(query_BHTK, key_BGSK.shape[2]),
        visible.first_BT.expand(len(query_BHTK), -1),
    )
    return attended.to(query_BHTK.dtype)


def chunked_attention(
    query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, bias: ScoreBias, visible: Visible
) -> Tensor:
    """Compute `reference_attention` for one chunk of queries at a time; the backward pass
    recomputes each chunk.
    """
    length = query_BHTK.shape[2]
    past = key_BGSK.shape[2] - query_BHTK.shape[2]
    outputs = []
    for start in range(0, length, CHUNK):
        rows = slice(start, start + CHUNK)
        stop = past + min(start + CHUNK, length)
        keys = key_BGSK[:, :, :stop]
        values = value_BGSK[:, :, :stop]
        part = _rows(bias, rows, stop)
        seen = Visible(visible.first_BT[:, rows], _upto(visible.real_BS, stop))
        outputs.append(
            checkpoint(
                reference_attention,
                query_BHTK[:, :, rows],
                keys,
                values,
                part,
                seen,
                use_reentrant=False,
            )
        )
    return torch.cat(outputs, dim=2)


def _rows(bias: ScoreBias, rows: slice, stop: int) -> ScoreBias:
    """Return the bias of a range of queries and the first `stop` keys."""
    table = None if bias.table_BHTN is None else bias.table_BHTN[:, :, rows]
    scale = None if bias.scale_BHT is None else bias.scale_BHT[:, :, rows]
    return ScoreBias(table, _upto(bias.key_BHS, stop), scale)


def _upto(parts: Tensor | None, stop: int) -> Tensor | None:
    return None if parts is None else parts[..., :stop]


class _Tiled(torch.autograd.Function):
    """Tiled attention; the backward pass recomputes the tiles from the inputs and each row's
    log-sum-exp.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        from deepseek.kernels.bias import biased_tiles

        inputs = tuple(part.contiguous() for part in inputs)
        out_BHTK, lse_BHT = biased_tiles.forward(*inputs)
        ctx.save_for_backward(*inputs, out_BHTK, lse_BHT)
        return out_BHTK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        from deepseek.kernels.bias import biased_tiles

        return (*biased_tiles.backward(*ctx.saved_tensors, grad_BHTK.contiguous()), None)
