"""Candidates as intervals: keys are laid out so that all that a query looks at lies in a few unbroken stretches.

The S keys of a key/value head are laid out twice: in their own order, padding last; and sorted by bucket, then
position. A query's local window is one interval of the first half, its sinks one interval of the second half, and each
bucket that it probes another one. Sinks count as one more bucket, which every query probes, and padding as another,
which none does. No key is in two intervals of a query, because it enters its bucket when it leaves the local window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
        codes_BHTP: the buckets of all intervals but the first two, int32. Intervals of later queries in the same
            bucket, as in the local window and among the sinks, neither start nor stop earlier.
    """

    order_BGZ: Tensor
    start_BHTI: Tensor
    stop_BHTI: Tensor
    codes_BHTP: Tensor


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
    (batch, groups, total), (_, heads, length, probes) = marked_BGS.shape, query_codes_BHTP.shape
    position_S, new = torch.arange(total, device=marked_BGS.device), slice(total - length, None)
    real_BS = marked_BGS[:, 0] != windows.num_buckets + 1
    natural_BS = (~real_BS * total + position_S).sort(-1).values % total
    sorted_BGS = (marked_BGS.long() * total + position_S).sort(-1).values
    order_BGZ = torch.cat((natural_BS[:, None].expand_as(sorted_BGS), sorted_BGS % total), -1)

    so_far_BS = real_BS.cumsum(-1)
    lowest_BS = (position_S - windows.local + 1).clamp(min=0).expand(batch, -1)
    lowest_BS = lowest_BS if first_BS is None else torch.maximum(lowest_BS, first_BS)
    local_start_BS = (so_far_BS - real_BS.long()).gather(1, lowest_BS)

    codes, share = query_codes_BHTP.int(), heads // groups
    start, stop = (codes.new_empty(batch, heads, length, 2 + probes) for _ in range(2))
    start[..., 0], stop[..., 0] = local_start_BS[:, None, new], so_far_BS[:, None, new]
    for g, sorted_BS in enumerate(
        sorted_BGS.unbind(1)
    ):  # one after the other, as the searches take eight bytes an interval
        own = slice(g * share, (g + 1) * share)
        buckets = nn.functional.pad(codes[:, own], (1, 0), value=windows.num_buckets)
        near = _bucket_intervals(sorted_BS.contiguous(), buckets, first_BS, windows)
        start[:, own, :, 1:], stop[:, own, :, 1:] = near
    start = torch.where(real_BS[:, None, new, None], start, stop)  # a padding query looks at nothing
    return Intervals(order_BGZ, start, stop, codes)


def _bucket_intervals(
    sorted_BS: Tensor, bucket_BRTJ: Tensor, first_BS: Tensor | None, windows: Windows
) -> tuple[Tensor, Tensor]:
    """Return start and stop, in the second half, of the intervals of the sinks, J = 0, and of the probed buckets."""
    (batch, total), length = sorted_BS.shape, bucket_BRTJ.shape[2]
    position_T = torch.arange(total - length, total, device=sorted_BS.device)

    def before(position_BRTJ: Tensor) -> Tensor:
        """The number of places before that of a key of the bucket at this position."""
        limits = (bucket_BRTJ.long() * total + position_BRTJ).view(batch, -1)
        return torch.searchsorted(sorted_BS, limits, out_int32=True).view_as(bucket_BRTJ)

    if first_BS is None:
        buckets = torch.arange(windows.num_buckets + 1, device=sorted_BS.device).expand(batch, -1)
        edges_BC = torch.searchsorted(sorted_BS, (buckets * total).contiguous(), out_int32=True)
        floor = edges_BC.gather(1, bucket_BRTJ.view(batch, -1).long()).view_as(bucket_BRTJ)
    else:
        floor = before(first_BS[:, None, total - length :, None])
    stop = torch.maximum(before((position_T - windows.local + 1)[:, None]), floor)
    window_J = floor.new_tensor([windows.sinks] + [windows.bucket] * (bucket_BRTJ.shape[-1] - 1))
    return torch.maximum(stop - window_J, floor) + total, stop + total
