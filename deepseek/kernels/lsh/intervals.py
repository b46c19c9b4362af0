"""Candidates as intervals: keys are laid out so that all that a query looks at lies in a few unbroken stretches.

The S keys of a key/value head are laid out twice: in their own order, padding last; and sorted by bucket, then
position. A query's local window is one interval of the first half, its sinks one interval of the second half, and each
bucket that it probes another one. Sinks count as one more bucket, which every query probes, and padding as another,
which none does. No key is in two intervals of a query, because it enters its bucket when it leaves the local window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """How much a query looks at: keys of the local window, sinks, and keys of each bucket that it probes."""

    local: int
    sinks: int
    bucket: int
    num_buckets: int

    def longest(self) -> int:
        return max(self.local, self.sinks, self.bucket)


@dataclass(frozen=True)
class Intervals:
    """Where the candidates of each query lie; I = 2 + P intervals a query: local window, sinks, probed buckets.

    Attributes:
        order_BGZ: which key lies at each of the Z = 2S places.
        start_BHTI, stop_BHTI: first place of an interval and the one past its last, int32; equal where it is empty.
        list_BHTI: number of the list of keys that an interval lies in, int32: 0 the local one, then the buckets.
            Within a list, intervals of later queries neither start nor stop earlier.
    """

    order_BGZ: Tensor
    start_BHTI: Tensor
    stop_BHTI: Tensor
    list_BHTI: Tensor


def document_starts(document_ids_BS: Tensor | None) -> Tensor | None:
    """Return the index `[B, S]` of the first token of each token's document; documents are runs of equal ids."""
    if document_ids_BS is None:
        return None
    opens_BS = torch.diff(document_ids_BS, dim=-1, prepend=document_ids_BS[:, :1]) != 0
    return (torch.arange(opens_BS.shape[1], device=opens_BS.device) * opens_BS).cummax(-1).values


def find_intervals(
    query_codes_BHTP: Tensor, marked_BGS: Tensor, first_BS: Tensor | None, windows: Windows
) -> Intervals:
    """Return the intervals of the last T of S tokens.

    Args:
        query_codes_BHTP: distinct buckets that each query probes.
        marked_BGS: codes of all keys, `num_buckets` at sinks and `num_buckets + 1` at padding.
        first_BS: see `document_starts`.
    """
    (batch, groups, total), (_, heads, length, _) = marked_BGS.shape, query_codes_BHTP.shape
    position_S, new = torch.arange(total, device=marked_BGS.device), slice(total - length, None)
    real_BS = marked_BGS[:, 0] != windows.num_buckets + 1
    natural_BS = ((~real_BS) * total + position_S).sort(-1).values % total
    sorted_BGS = (marked_BGS.long() * total + position_S).sort(-1).values
    order_BGZ = torch.cat((natural_BS[:, None].expand_as(sorted_BGS), sorted_BGS % total), -1)

    sinks_BHT1 = query_codes_BHTP.new_full((batch, heads, length, 1), windows.num_buckets)
    bucket_BHTJ = torch.cat((sinks_BHT1, query_codes_BHTP), -1).long()
    age_T1 = (position_S[new] - windows.local)[:, None]
    stop_BHTJ = _count_below(sorted_BGS, bucket_BHTJ * total + age_T1 + 1)
    if first_BS is None:
        edges_BGC = torch.searchsorted(sorted_BGS, (position_S.new_tensor(range(windows.num_buckets + 1)) * total)
                                       .expand(batch, groups, -1).contiguous())  # fmt: skip
        floor_BHTJ = edges_BGC.gather(2, bucket_BHTJ.view(batch, groups, -1)).view_as(bucket_BHTJ)
    else:
        floor_BHTJ = _count_below(sorted_BGS, bucket_BHTJ * total + first_BS[:, None, new, None])
    window_J = bucket_BHTJ.new_tensor([windows.sinks] + [windows.bucket] * query_codes_BHTP.shape[-1])
    stop_BHTJ = torch.maximum(stop_BHTJ, floor_BHTJ)
    start_BHTJ = torch.maximum(stop_BHTJ - window_J, floor_BHTJ)

    so_far_BS = real_BS.cumsum(-1)
    lowest_BS = (position_S - windows.local + 1).clamp(min=0).expand(batch, -1)
    lowest_BS = lowest_BS if first_BS is None else torch.maximum(lowest_BS, first_BS)
    local = ((so_far_BS - real_BS.long()).gather(1, lowest_BS), so_far_BS)
    start, stop = (
        torch.cat((near[:, None, new, None].expand(-1, heads, -1, 1), old + total), -1).int()
        for near, old in zip(local, (start_BHTJ, stop_BHTJ), strict=True)
    )
    start = torch.where(real_BS[:, None, new, None], start, stop)  # a padding query looks at nothing
    return Intervals(order_BGZ, start, stop, torch.cat((torch.full_like(sinks_BHT1, -1), bucket_BHTJ), -1).int() + 1)


def _count_below(sorted_BGS: Tensor, limit_BHTJ: Tensor) -> Tensor:
    limits = limit_BHTJ.reshape(*sorted_BGS.shape[:2], -1)
    return torch.searchsorted(sorted_BGS, limits).view_as(limit_BHTJ)
