"""Exact attention whose scores carry a position bias that depends on query, distance and key.

    s[i, j] = scale[i] * q[i] . k[j] / sqrt(K) + table[i, bucket(i - j)] + key[j]

The bias is three tensors that grow with the length, never one with its square.
`reference_attention` writes the formula down; `biased_attention` computes it in tiles
(`biased_tiles.py`), or in chunks of queries where those cannot run, and recomputes its scores in
the backward pass.
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
"""Queries whose scores the chunked path holds at once."""


@dataclass(frozen=True)
class ScoreBias:
    """What a position encoding adds to the scores of T queries and S keys; a part that is None adds
    nothing.

    Attributes:
        table_BHTN: one value for each query and bucket of distance (N = 32, see `distance.py`).
        key_BHS: one value for each key, in fp64: only differences count, small beside the sums of a
            long row.
        scale_BHT: factor of the query.
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
        """Return table `[B, H, T, 32]`, at least in fp32, and the terms `[B, H, S]` of `total` keys
        in fp64.
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
    """Which keys a query sees: its own slot and all before it down to `first_BT`.

    Attributes:
        first_BT: slot of the first key that each query may see, its own at the latest; B is 1 where
            rows are alike.
        real_BS: False at padding between real tokens, which is not seen and not counted as
            distance; None if there is no such padding.
    """

    first_BT: Tensor
    real_BS: Tensor | None = None

    def mask(self, total: int) -> Tensor:
        """Return True `[B or 1, T, S]` where a query sees a key; the queries have the last T of
        `total` slots.
        """
        slots_S = torch.arange(total, device=self.first_BT.device)
        own_T1 = torch.arange(total - self.first_BT.shape[1], total, device=self.first_BT.device)[
            :, None
        ]
        seen_BTS = (slots_S <= own_T1) & (slots_S >= self.first_BT[..., None])
        return (
            seen_BTS
            if self.real_BS is None
            else (seen_BTS & self.real_BS[:, None]) | (slots_S == own_T1)
        )


def reference_attention(
    query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, bias: ScoreBias, visible: Visible
) -> Tensor:
    """Return the attended values `[B, H, T, K]` by the formula, all scores at once; queries are the
    last T slots.
    """
    length = query_BHTK.shape[2]
    total = key_BGSK.shape[2]
    repeats = query_BHTK.shape[1] // key_BGSK.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key_BGSK, value_BGSK))
    scores_BHTS = scaled_query(query_BHTK, bias) @ key.transpose(-1, -2)
    if bias.table_BHTN is not None:
        slots_1S = torch.arange(total, device=key.device)[None]
        places_BS = slots_1S if visible.real_BS is None else visible.real_BS.cumsum(-1)
        bucket_BTS = distance_buckets(places_BS[:, -length:, None] - places_BS[:, None])
        scores_BHTS = scores_BHTS + bias.table_BHTN.gather(
            -1, bucket_BTS[:, None].expand_as(scores_BHTS)
        )
    if bias.key_BHS is not None:
        shifted_BHS = bias.key_BHS - bias.key_BHS[..., -1:].detach()
        scores_BHTS = scores_BHTS + shifted_BHS[:, :, None].to(scores_BHTS.dtype)
    return scores_BHTS.masked_fill(~visible.mask(total)[:, None], float("-inf")).softmax(-1) @ value


def scaled_query(query_BHTK: Tensor, bias: ScoreBias) -> Tensor:
    """Return the queries times `bias.scale_BHT` and over the root of K."""
    return bias.scaled(query_BHTK) * query_BHTK.shape[-1] ** -0.5


def biased_attention(
    query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, bias: ScoreBias, visible: Visible
) -> Tensor:
    """Return what `reference_attention` returns, forward and backward in memory that grows with the
    length only.
    """
    parts = (query_BHTK, key_BGSK, value_BGSK)
    # fp64 is for checks; numbers of 16 bits are widened, which costs memory in proportion to the
    # length.
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
    """Return what `reference_attention` returns, a chunk of queries at a time, each recomputed in
    the backward pass.
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
    table = None if bias.table_BHTN is None else bias.table_BHTN[:, :, rows]
    scale = None if bias.scale_BHT is None else bias.scale_BHT[:, :, rows]
    return ScoreBias(table, _upto(bias.key_BHS, stop), scale)


def _upto(parts: Tensor | None, stop: int) -> Tensor | None:
    return None if parts is None else parts[..., :stop]


class _Tiled(torch.autograd.Function):
    """Attention in tiles; the backward pass recomputes them from the inputs and each row's
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
