"""Attention over intervals with torch's own operators and static shapes: the path of a GPU, and of any dtype.

One pass for each of a query's intervals. A tile holds up to `QUERIES` queries whose intervals end within the same
`SPAN` places, so its keys lie in one stretch of fixed length. How many tiles each span needs depends on the data, but
their total does not, up to a known bound; what is left over is masked.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.kernels.lsh.intervals import Intervals, Windows

QUERIES, SPAN = 64, 64
SLAB = 1 << 24  # scores held at once


@dataclass(frozen=True)
class Tiles:
    """Some tiles of one pass: rows of queries `[t, m]` and of keys `[t, w]`, counted over B, H, T and B, G, S; the mask
    says who sees whom."""

    rows_tm: Tensor
    keys_tw: Tensor
    mask_tmw: Tensor


def _passes(intervals: Intervals, windows: Windows) -> Iterator[Iterator[Tiles]]:
    """The passes over all heads."""
    batch, groups, places = intervals.order_BGZ.shape
    offset_BG1 = torch.arange(batch * groups, device=intervals.order_BGZ.device).view(batch, groups, 1) * places
    keys = (intervals.order_BGZ + offset_BG1 // 2).flatten()
    for i in range(intervals.start_BHTI.shape[-1]):
        start, stop = (
            (part[..., i].reshape(batch, groups, -1) + offset_BG1).flatten()
            for part in (intervals.start_BHTI, intervals.stop_BHTI)
        )
        window = (windows.local, windows.sinks)[i] if i < 2 else windows.bucket
        yield _tiles(start, stop, min(window, places), keys)


def _tiles(start_N: Tensor, stop_N: Tensor, window: int, keys_P: Tensor) -> Iterator[Tiles]:
    """The tiles of one pass, as many at a time as `SLAB` scores allow; `window` is the length of an interval."""
    span_N, order_N = ((stop_N - 1).clamp(min=0) // SPAN).sort(stable=True)
    spans = torch.arange(len(keys_P) // SPAN + 1, device=start_N.device)
    first = torch.searchsorted(span_N, spans)  # of each span, in sorted rows
    needed = (torch.searchsorted(span_N, spans, right=True) - first + QUERIES - 1) // QUERIES
    tile_of_span = needed.cumsum(0) - needed
    rank_N = torch.arange(len(span_N), device=span_N.device) - first[span_N]
    total = len(start_N) // QUERIES + len(spans)
    rows = order_N.new_full((total * QUERIES,), len(start_N))  # one past the last row: nobody
    rows[tile_of_span[span_N] * QUERIES + rank_N] = order_N
    rows_TM = rows.view(total, QUERIES)
    span_T = torch.searchsorted(tile_of_span, torch.arange(total, device=rows.device), right=True) - 1
    keys_W = torch.arange(SPAN + window - 1, device=rows.device) + 1 - window
    start_N, stop_N = torch.cat((start_N, start_N.new_zeros(1))), torch.cat((stop_N, stop_N.new_zeros(1)))
    size = max(1, SLAB // (QUERIES * max(1, len(keys_W))))
    for begin in range(0, total, size):
        rows_tm = rows_TM[begin : begin + size]
        places_tw = span_T[begin : begin + size, None] * SPAN + keys_W
        inside = (start_N[rows_tm, None] <= places_tw[:, None]) & (places_tw[:, None] < stop_N[rows_tm, None])
        yield Tiles(rows_tm, keys_P[places_tw.clamp(0, len(keys_P) - 1)], inside)


def _rows(x_BHT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows `[B * H * T + 1, ...]`, the last one of zeros for nobody."""
    rows = x_BHT.flatten(0, 2).to(dtype)
    return torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))


def forward(
    query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, intervals: Intervals, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention `[B, H, T, K]` and the logarithm of its denominator `[B, H, T]`, both at least in fp32."""
    wide = torch.promote_types(query_BHTK.dtype, torch.float32)
    query, key, value = _rows(query_BHTK, query_BHTK.dtype), key_BGSK.flatten(0, 2), value_BGSK.flatten(0, 2)
    lowest = torch.finfo(wide).min
    out, lse = torch.zeros_like(query, dtype=wide), query.new_full(query.shape[:1], lowest, dtype=wide)
    for tiles in _passes(intervals, windows):
        new_out, new_lse = torch.zeros_like(out), torch.full_like(lse, lowest)
        for tile in tiles:
            scores = (query[tile.rows_tm] @ key[tile.keys_tw].mT).to(wide) * scale
            scores = scores.masked_fill(~tile.mask_tmw, lowest)
            lse_tm = scores.logsumexp(-1).masked_fill(~tile.mask_tmw.any(-1), lowest)
            weights = (scores - lse_tm[..., None]).exp().masked_fill(~tile.mask_tmw, 0)
            new_out[tile.rows_tm] = (weights.to(value.dtype) @ value[tile.keys_tw]).to(wide)
            new_lse[tile.rows_tm] = lse_tm
        merged = torch.logaddexp(lse, new_lse)
        out = out * (lse - merged).exp()[:, None] + new_out * (new_lse - merged).exp()[:, None]
        lse = merged
    return out[:-1].view(query_BHTK.shape), lse[:-1].view(query_BHTK.shape[:3])


def backward(
    grad_BHTK: Tensor, query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, out_BHTK: Tensor, lse_BHT: Tensor,
    intervals: Intervals, windows: Windows, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of queries `[B, H, T, K]`, keys and values `[B, G, S, K]`."""
    dtype, wide = query_BHTK.dtype, torch.promote_types(query_BHTK.dtype, torch.float32)
    key, value = key_BGSK.flatten(0, 2), value_BGSK.flatten(0, 2)
    query, grad, lse = _rows(query_BHTK, dtype), _rows(grad_BHTK, dtype), _rows(lse_BHT, wide)[:, None]
    dots = _rows((grad_BHTK.to(wide) * out_BHTK).sum(-1), wide)[:, None]
    grad_query = torch.zeros_like(query, dtype=wide)
    grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
    for tiles in _passes(intervals, windows):
        for tile in tiles:
            rows, keys = tile.rows_tm, tile.keys_tw
            scores = (query[rows] @ key[keys].mT).to(wide) * scale
            weights = (scores.masked_fill(~tile.mask_tmw, -torch.inf) - lse[rows]).exp()
            grad_scores = weights * ((grad[rows] @ value[keys].mT).to(wide) - dots[rows]) * scale
            weights, grad_scores = weights.to(dtype), grad_scores.to(dtype)
            grad_query[rows] += (grad_scores @ key[keys]).to(wide)  # a query has one row a pass; nobody's gets zeros
            grad_key.index_add_(0, keys.flatten(), (grad_scores.mT @ query[rows]).to(wide).flatten(0, 1))
            grad_value.index_add_(0, keys.flatten(), (weights.mT @ grad[rows]).to(wide).flatten(0, 1))
    return grad_query[:-1].view(query_BHTK.shape), grad_key.view_as(key_BGSK), grad_value.view_as(value_BGSK)
