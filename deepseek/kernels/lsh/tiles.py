"""Attention over intervals with torch's own operators and static shapes: the path for GPUs and for
every dtype.

It makes one pass for each of a query's intervals. A tile holds up to `QUERIES` queries whose
intervals end within the same `SPAN` places, so its keys lie in one range of fixed length. The
number of tiles per span depends on the data, but their total has a known bound; unused entries are
masked.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepseek.kernels.bias.distance import distance_buckets
from deepseek.kernels.lsh.intervals import Intervals, Windows

QUERIES = 64
SPAN = 64
SLAB = 1 << 24  # maximum number of scores in memory

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Queries, keys, values, and table and terms of the bias (see `attention._Attention`) or None."""


@dataclass(frozen=True)
class Tiles:
    """Some tiles of one pass.

    Attributes:
        rows_tm: rows of queries, numbered over B, H, T.
        keys_tw: rows of keys, numbered over B, G, S.
        mask_tmw: True where a query attends to a key.
    """

    rows_tm: Tensor
    keys_tw: Tensor
    mask_tmw: Tensor


def _passes(intervals: Intervals, windows: Windows) -> Iterator[Iterator[Tiles]]:
    """Yield the passes, each over all heads."""
    batch, groups, places = intervals.order_BGZ.shape
    total = intervals.rank_BS.shape[1]
    offset_BG1 = torch.arange(batch * groups, device=intervals.order_BGZ.device).view(
        batch, groups, 1
    )
    keys = (intervals.order_BGZ + offset_BG1 * total).flatten()

    def limits(i: int) -> tuple[Tensor, Tensor]:
        parts = (
            part[..., i].reshape(batch, groups, -1)
            for part in (intervals.start_BHTI, intervals.stop_BHTI)
        )
        start, stop = ((part + offset_BG1 * places).flatten() for part in parts)
        return start, stop

    a_round = (intervals.start_BHTI.shape[-1] - 1) // windows.rounds
    for i in range(intervals.start_BHTI.shape[-1]):
        window = (
            windows.nearest if i == 0 else windows.bucket if (i - 1) % a_round else windows.sinks
        )
        tiles = _tiles(*limits(i), min(window, places), keys)
        for r in range((i - 1) // a_round if i else 0):
            places_N = (intervals.place_BGRS[:, :, r] + offset_BG1 * places).flatten()
            earlier_limits = [limits(1 + r * a_round + n) for n in range(a_round)]
            tiles = _leave_out(tiles, places_N, earlier_limits)
        yield tiles


def _leave_out(
    tiles: Iterator[Tiles], places_S: Tensor, earlier_limits: list[tuple[Tensor, Tensor]]
) -> Iterator[Tiles]:
    """Yield the tiles with those keys masked that an earlier round has found: their places lie in
    its intervals.
    """
    for tile in tiles:
        mask_tmw = tile.mask_tmw
        rows_tm1 = tile.rows_tm.clamp(max=len(earlier_limits[0][0]) - 1)[..., None]
        places_t1w = places_S[tile.keys_tw][:, None]
        for start_N, stop_N in earlier_limits:
            mask_tmw = mask_tmw & (
                (places_t1w < start_N[rows_tm1]) | (places_t1w >= stop_N[rows_tm1])
            )
        yield replace(tile, mask_tmw=mask_tmw)


def _tiles(start_N: Tensor, stop_N: Tensor, window: int, keys_P: Tensor) -> Iterator[Tiles]:
    """Yield the tiles of one pass, as many at a time as `SLAB` allows; `window` is the maximum
    length of an interval.
    """
    span_N, order_N = ((stop_N - 1).clamp(min=0) // SPAN).sort(stable=True)
    spans = torch.arange(len(keys_P) // SPAN + 1, device=start_N.device)
    first = torch.searchsorted(span_N, spans)  # first sorted row of each span
    needed = (torch.searchsorted(span_N, spans, right=True) - first + QUERIES - 1) // QUERIES
    tile_of_span = needed.cumsum(0) - needed
    rank_N = torch.arange(len(span_N), device=span_N.device) - first[span_N]
    total = len(start_N) // QUERIES + len(spans)
    # One past the last row marks an unused entry.
    rows = order_N.new_full((total * QUERIES,), len(start_N))
    rows[tile_of_span[span_N] * QUERIES + rank_N] = order_N
    rows_TM = rows.view(total, QUERIES)
    span_T = (
        torch.searchsorted(tile_of_span, torch.arange(total, device=rows.device), right=True) - 1
    )
    keys_W = torch.arange(SPAN + window - 1, device=rows.device) + 1 - window
    start_N = torch.cat((start_N, start_N.new_zeros(1)))
    stop_N = torch.cat((stop_N, stop_N.new_zeros(1)))
    size = max(1, SLAB // (QUERIES * max(1, len(keys_W))))
    for begin in range(0, total, size):
        rows_tm = rows_TM[begin : begin + size]
        places_tw = span_T[begin : begin + size, None] * SPAN + keys_W
        inside = (start_N[rows_tm, None] <= places_tw[:, None]) & (
            places_tw[:, None] < stop_N[rows_tm, None]
        )
        yield Tiles(rows_tm, keys_P[places_tw.clamp(0, len(keys_P) - 1)], inside)


def _rows(x_BHT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows `[B * H * T + 1, ...]`; the last one is zeros, for unused entries."""
    rows = x_BHT.flatten(0, 2).to(dtype)
    return torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))


class _Bias:
    """The bias of the scores of tiles, and its gradients."""

    def __init__(self, table_BHTN: Tensor, term_BHS: Tensor, rank_BS: Tensor) -> None:
        (_, self.heads, self.length, _), self.total = table_BHTN.shape, term_BHS.shape[2]
        self.rows = _rows(table_BHTN, table_BHTN.dtype)
        self.terms = term_BHS.flatten()
        self.ranks = rank_BS.flatten()
        self.grad_rows = torch.zeros_like(self.rows)
        self.grad_terms = torch.zeros_like(self.terms)

    def _find(self, tile: Tiles) -> tuple[Tensor, Tensor, Tensor]:
        """Return each pair's bucket of distance `[t, m, w]`, and the indices of the terms of its
        key and its query.
        """
        row_tm1 = tile.rows_tm.clamp(max=len(self.rows) - 2)[..., None]
        head_tm1 = row_tm1 // self.length
        key_t1w = tile.keys_tw[:, None] % self.total
        query_tm1 = self.total - self.length + row_tm1 % self.length
        text_tm1 = head_tm1 // self.heads
        distance_tmw = (
            self.ranks[text_tm1 * self.total + query_tm1]
            - self.ranks[text_tm1 * self.total + key_t1w]
        )
        return (
            distance_buckets(distance_tmw),
            head_tm1 * self.total + key_t1w,
            head_tm1 * self.total + query_tm1,
        )

    def of(self, tile: Tiles) -> Tensor:
        """Return the bias `[t, m, w]`."""
        bucket_tmw, key_tmw, query_tm1 = self._find(tile)
        return self.rows[tile.rows_tm].gather(-1, bucket_tmw) + (
            self.terms[key_tmw] - self.terms[query_tm1]
        )

    def collect(self, grad_tmw: Tensor, tile: Tiles) -> None:
        """Accumulate gradients; those of unused entries are zero."""
        bucket_tmw, key_tmw, _ = self._find(tile)
        grad_tmN = grad_tmw.new_zeros(*tile.rows_tm.shape, self.rows.shape[1])
        self.grad_rows[tile.rows_tm] += grad_tmN.scatter_add_(-1, bucket_tmw, grad_tmw)
        self.grad_terms.index_add_(0, key_tmw.flatten(), grad_tmw.flatten().to(self.terms.dtype))


def _bias(inputs: Inputs, intervals: Intervals) -> _Bias | None:
    """Return the bias of the inputs, if any."""
    table, term = inputs[3:]
    return None if table is None or term is None else _Bias(table, term, intervals.rank_BS)


def forward(
    inputs: Inputs, intervals: Intervals, windows: Windows, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention `[B, H, T, K]` and the logarithm of its denominator `[B, H, T]`, both at
    least in fp32.

    Args:
        inputs: queries, keys, values and bias.
        intervals: the candidates of each query.
        windows: sizes of the windows.
        scale: factor of the scores.
    """
    query_BHTK, key_BGSK, value_BGSK, *_ = inputs
    wide = torch.promote_types(query_BHTK.dtype, torch.float32)
    bias = _bias(inputs, intervals)
    query = _rows(query_BHTK, query_BHTK.dtype)
    key = key_BGSK.flatten(0, 2)
    value = value_BGSK.flatten(0, 2)
    lowest = torch.finfo(wide).min
    out = torch.zeros_like(query, dtype=wide)
    lse = query.new_full(query.shape[:1], lowest, dtype=wide)
    for tiles in _passes(intervals, windows):
        new_out = torch.zeros_like(out)
        new_lse = torch.full_like(lse, lowest)
        for tile in tiles:
            scores = _scores(query, key, tile, scale, bias).masked_fill(~tile.mask_tmw, lowest)
            lse_tm = scores.logsumexp(-1).masked_fill(~tile.mask_tmw.any(-1), lowest)
            weights = (scores - lse_tm[..., None]).exp().masked_fill(~tile.mask_tmw, 0)
            new_out[tile.rows_tm] = (weights.to(value.dtype) @ value[tile.keys_tw]).to(wide)
            new_lse[tile.rows_tm] = lse_tm
        merged = torch.logaddexp(lse, new_lse)
        out = out * (lse - merged).exp()[:, None] + new_out * (new_lse - merged).exp()[:, None]
        lse = merged
    return out[:-1].view(query_BHTK.shape), lse[:-1].view(query_BHTK.shape[:3])


def _scores(query: Tensor, key: Tensor, tile: Tiles, scale: float, bias: _Bias | None) -> Tensor:
    """Return the scores of a tile, with their bias."""
    scores = (query[tile.rows_tm] @ key[tile.keys_tw].mT).to(
        torch.promote_types(query.dtype, torch.float32)
    ) * scale
    return scores if bias is None else scores + bias.of(tile).to(scores.dtype)


def backward(
    grad_BHTK: Tensor,
    grad_lse_BHT: Tensor,
    inputs: Inputs,
    out_BHTK: Tensor,
    lse_BHT: Tensor,
    intervals: Intervals,
    windows: Windows,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of all inputs; None for the two parts of the bias if there is none.

    Args:
        grad_BHTK: gradient of the attended values.
        grad_lse_BHT: gradient of the logarithms of the denominators.
        inputs, intervals, windows, scale: as in `forward`.
        out_BHTK, lse_BHT: results of `forward`.
    """
    query_BHTK, key_BGSK, value_BGSK, table, term = inputs
    dtype = query_BHTK.dtype
    wide = out_BHTK.dtype
    bias = _bias(inputs, intervals)
    key = key_BGSK.flatten(0, 2)
    value = value_BGSK.flatten(0, 2)
    query = _rows(query_BHTK, dtype)
    grad = _rows(grad_BHTK, dtype)
    lse = _rows(lse_BHT, wide)[:, None]
    dots = _rows((grad_BHTK.to(wide) * out_BHTK).sum(-1) - grad_lse_BHT, wide)[:, None]
    grad_query = torch.zeros_like(query, dtype=wide)
    grad_key = torch.zeros_like(key, dtype=wide)
    grad_value = torch.zeros_like(value, dtype=wide)
    for tiles in _passes(intervals, windows):
        for tile in tiles:
            rows = tile.rows_tm
            keys = tile.keys_tw
            scores = _scores(query, key, tile, scale, bias).masked_fill(~tile.mask_tmw, -torch.inf)
            weights = (scores - lse[rows]).exp()
            grad_scores = weights * ((grad[rows] @ value[keys].mT).to(wide) - dots[rows])
            if bias is not None:
                bias.collect(grad_scores, tile)
            weights = weights.to(dtype)
            grad_scores = (grad_scores * scale).to(dtype)
            # A query occurs once per pass, so indices do not collide, except those of unused
            # entries, which add zeros.
            grad_query[rows] += (grad_scores @ key[keys]).to(wide)
            grad_key.index_add_(
                0, keys.flatten(), (grad_scores.mT @ query[rows]).to(wide).flatten(0, 1)
            )
            grad_value.index_add_(
                0, keys.flatten(), (weights.mT @ grad[rows]).to(wide).flatten(0, 1)
            )
    grads = (
        grad_query[:-1].view(query_BHTK.shape),
        grad_key.view_as(key_BGSK),
        grad_value.view_as(value_BGSK),
    )
    if bias is None or table is None or term is None:
        return *grads, None, None
    return *grads, bias.grad_rows[:-1].view_as(table), bias.grad_terms.view_as(term)
