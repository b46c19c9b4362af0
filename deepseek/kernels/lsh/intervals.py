"""Candidates as intervals: keys are laid out so that the candidates of a query form a few
contiguous intervals.

The S keys of a key/value head are laid out 1 + R times: once in order, padding last, and once for
each of R rounds of hashing, sorted by bucket, then by position. A query's local window is an
interval of the first part. Each bucket that it probes is an interval of its round's part. Sinks
form an additional bucket of the first round, which every query probes; padding forms another, which
none does.

No key is in two intervals of a query in the same round, because it enters its bucket when it leaves
the local window. A key that an earlier round has already found is excluded by its place in that
round's part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepseek.kernels.numba import openmp


@dataclass(frozen=True)
class Windows:
    """Sizes of the windows of LSH attention.

    Attributes:
        local: keys in the local window.
        sinks: sink keys at the start of a document.
        bucket: keys of each probed bucket.
        num_buckets: buckets of one round of hashing.
        rounds: rounds of hashing.
        far_field: whether to attend to summaries of the other keys (see `far_field.py`).
        exact: number of tokens at the start of a document that attend to all keys before them.
    """

    local: int
    sinks: int
    bucket: int
    num_buckets: int
    rounds: int = 1
    far_field: bool = False
    exact: int = 0

    @property
    def nearest(self) -> int:
        """Number of keys in the longest local interval."""
        return max(self.local, self.exact)

    @property
    def num_lists(self) -> int:
        """Number of lists of keys: the local one, and the buckets of each round, including that of
        the sinks.
        """
        return 1 + self.rounds * (self.num_buckets + 1)

    def longest(self) -> int:
        """Return the length of the longest window."""
        return max(self.nearest, self.sinks, self.bucket)


@dataclass(frozen=True)
class Intervals:
    """The candidates of each query as I = 1 + R(1 + P) intervals: the local one, then the sinks and
    the probed buckets of each round. Only the first round has sinks.

    Attributes:
        order_BGZ: key at each of the Z = (1 + R)S places of the layout.
        start_BHTI, stop_BHTI: first place of each interval, and the one past its last, int32; equal
            if it is empty.
        codes_BHTP: bucket of each interval except the local ones and those of the sinks, int32.
            Within a list (see `Windows.num_lists`), intervals of later queries neither start nor
            stop earlier.
        place_BGRS: place of each key in the parts of all rounds but the last, int32.
        rank_BS: number of real tokens up to each token, int32; differences are distances.
    """

    order_BGZ: Tensor
    start_BHTI: Tensor
    stop_BHTI: Tensor
    codes_BHTP: Tensor
    place_BGRS: Tensor
    rank_BS: Tensor


def document_starts(document_ids_BS: Tensor | None) -> Tensor | None:
    """Return the index `[B, S]` of the first token of each token's document; None for None.

    Args:
        document_ids_BS: document of each token; documents are runs of equal ids.
    """
    if document_ids_BS is None:
        return None
    opens_BS = torch.diff(document_ids_BS, dim=-1, prepend=document_ids_BS[:, :1]) != 0
    return (torch.arange(opens_BS.shape[1], device=opens_BS.device) * opens_BS).cummax(-1).values


def find_intervals(
    query_codes_BHTP: Tensor, marked_BJS: Tensor, first_BS: Tensor | None, windows: Windows
) -> Intervals:
    """Return the intervals of the last T of S tokens.

    Args:
        query_codes_BHTP: distinct buckets that each query probes, P in each round.
        marked_BJS: codes of all keys as stored in `decode.BucketCache`, J = GR.
        first_BS: see `document_starts`.
        windows: sizes of the windows.
    """
    (batch, rows, total), (_, heads, length, _), rounds = (
        marked_BJS.shape,
        query_codes_BHTP.shape,
        windows.rounds,
    )
    groups = rows // rounds
    position_S = torch.arange(total, device=marked_BJS.device)
    new = slice(total - length, None)
    real_BS = marked_BJS[:, 0] != windows.num_buckets + 1
    natural_BS = (~real_BS * total + position_S).sort(-1).values % total
    sorted_BJS = (marked_BJS.long() * total + position_S).sort(-1).values
    order_BGZ = torch.cat(
        [natural_BS[:, None].expand(-1, groups, -1), (sorted_BJS % total).view(batch, groups, -1)],
        -1,
    )

    so_far_BS = real_BS.cumsum(-1)
    lowest_BS = (position_S - windows.local + 1).clamp(min=0).expand(batch, -1)
    opening_BS = torch.zeros_like(so_far_BS) if first_BS is None else first_BS
    before_BS = so_far_BS - real_BS.long()
    early_BS = before_BS - before_BS.gather(1, opening_BS) < windows.exact
    lowest_BS = torch.where(early_BS, opening_BS, torch.maximum(lowest_BS, opening_BS))
    local_start_BS = before_BS.gather(1, lowest_BS)

    codes = query_codes_BHTP.int().unflatten(-1, (rounds, -1))
    start, stop = (
        codes.new_empty(batch, heads, length, 1 + rounds * (1 + codes.shape[-1])) for _ in range(2)
    )
    start[..., 0] = local_start_BS[:, None, new]
    stop[..., 0] = so_far_BS[:, None, new]
    sizes = (rounds, windows.num_buckets, windows.local, windows.sinks, windows.bucket)
    if marked_BJS.device.type == "cpu" and openmp.runtime() is not None:
        # Imported here because it imports numba, which nothing else needs.
        from deepseek.kernels.lsh import bucket_intervals

        flat = codes.flatten(-2)
        bucket_intervals.scan(flat, marked_BJS, first_BS, sizes, (start, stop))
    else:
        _search(codes, sorted_BJS, first_BS, windows, (start, stop))
    # Padding queries attend to nothing, and early ones to no buckets.
    attends_BTI = real_BS[:, new, None].expand(-1, -1, start.shape[-1]).clone()
    attends_BTI[..., 1:] &= ~early_BS[:, new, None]
    start = torch.where(attends_BTI[:, None], start, stop)
    return Intervals(
        order_BGZ, start, stop, codes.flatten(-2), _places(order_BGZ, total), so_far_BS.int()
    )


def _search(
    codes_BHTRP: Tensor,
    sorted_BJS: Tensor,
    first_BS: Tensor | None,
    windows: Windows,
    bounds: tuple[Tensor, Tensor],
) -> None:
    """Set all intervals but the local ones, with torch's operators."""
    heads = codes_BHTRP.shape[1]
    rounds = windows.rounds
    _, rows, total = sorted_BJS.shape
    groups = rows // rounds
    starts, stops = (part[..., 1:].unflatten(-1, (rounds, -1)) for part in bounds)
    # One row at a time, because the searches need eight bytes per interval.
    for j, sorted_BS in enumerate(sorted_BJS.unbind(1)):
        heads_of_group = slice(j // rounds * heads // groups, (j // rounds + 1) * heads // groups)
        r = j % rounds
        buckets = nn.functional.pad(
            codes_BHTRP[:, heads_of_group, :, r], (1, 0), value=windows.num_buckets
        )
        found = _bucket_intervals(sorted_BS.contiguous(), buckets, first_BS, windows)
        starts[:, heads_of_group, :, r], stops[:, heads_of_group, :, r] = (
            part + (1 + r) * total for part in found
        )


def _bucket_intervals(
    sorted_BS: Tensor, bucket_BRTJ: Tensor, first_BS: Tensor | None, windows: Windows
) -> tuple[Tensor, Tensor]:
    """Return start and stop, within their part, of the intervals of the sinks (J = 0) and of the
    probed buckets.
    """
    (batch, total), length = sorted_BS.shape, bucket_BRTJ.shape[2]
    position_T = torch.arange(total - length, total, device=sorted_BS.device)

    def before(position_BRTJ: Tensor) -> Tensor:
        """Return the number of keys before this bucket and position in sorted order."""
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
    return torch.maximum(stop - window_J, floor), stop


def _places(order_BGZ: Tensor, total: int) -> Tensor:
    """Return the place of each key in every part of the layout except the first and the last."""
    order_BGRS = order_BGZ.unflatten(-1, (-1, total))[:, :, 1:-1]
    place_BGRS = torch.arange(
        total, order_BGRS[0, 0].numel() + total, device=order_BGZ.device, dtype=torch.int32
    )
    place_BGRS = place_BGRS.view(order_BGRS.shape[2:]).expand_as(order_BGRS)
    return torch.empty_like(order_BGRS, dtype=torch.int32).scatter_(-1, order_BGRS, place_BGRS)
