"""Candidates as intervals: keys are laid out so that all that a query looks at lies in a few unbroken stretches.

The S keys of a key/value head are laid out twice: in their own order, padding last; and sorted by document, bucket and
position. A query's local window is one interval of the first half, its sinks one interval of the second half, and each
bucket that it probes another one. Sinks count as one more bucket, which every query probes, and padding as another,
which none does. No key is in two intervals of a query, because it enters its bucket when it leaves the local window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.kernels import openmp

SPARE = 4  # places past the end of both halves, so that kernels may read keys four by four


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
        order_BGZ: which key lies at each of the Z = 2S + `SPARE` places.
        start_BTHI, stop_BTHI: first place of an interval and the one past its last, int32; equal where it is empty.
        list_BTHI: number of the list of keys that an interval lies in, int32: 0 the local one, then the buckets.
            Within a list, intervals of later queries neither start nor stop earlier.
    """

    order_BGZ: Tensor
    start_BTHI: Tensor
    stop_BTHI: Tensor
    list_BTHI: Tensor


def find_intervals(query_codes_BHTP: Tensor, marked_BGS: Tensor, first_BS: Tensor, windows: Windows) -> Intervals:
    """Return the intervals of the last T of S tokens.

    Args:
        query_codes_BHTP: distinct buckets that each query probes.
        marked_BGS: codes of all keys, `num_buckets` at sinks and `num_buckets + 1` at padding.
        first_BS: index of the first token of each token's document.
    """
    sinks_BTH1 = query_codes_BHTP.new_full((*query_codes_BHTP.shape[:3], 1), windows.num_buckets)
    list_BTHI = torch.cat((torch.full_like(sinks_BTH1, -1), sinks_BTH1, query_codes_BHTP), -1).transpose(1, 2).int() + 1
    if marked_BGS.device.type == "cpu" and openmp.runtime() is not None:
        from deepseek.kernels.lsh import sweep  # it imports numba, which nothing else here needs

        return Intervals(*sweep.find_intervals(list_BTHI, marked_BGS, first_BS, windows), list_BTHI)
    return Intervals(*_find_intervals(list_BTHI, marked_BGS, first_BS, windows), list_BTHI)


def _find_intervals(
    list_BTHI: Tensor, marked_BGS: Tensor, first_BS: Tensor, windows: Windows
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, groups, total), length = marked_BGS.shape, list_BTHI.shape[1]
    last, padding = slice(total - length, None), windows.num_buckets + 1
    real_BS, position_S = marked_BGS[:, 0] != padding, torch.arange(total, device=marked_BGS.device)
    lowest_BT = torch.maximum(position_S - windows.local + 1, first_BS)[:, last]
    so_far_BS = real_BS.cumsum(-1)
    local_start_BT = (so_far_BS - real_BS.long()).gather(1, lowest_BT)

    bucket_BGS = (first_BS[:, None] * (padding + 1) + marked_BGS).masked_fill(~real_BS[:, None], total * (padding + 1))
    sorted_BGS, order_BGS = (bucket_BGS * total + position_S).sort(-1)
    probed_BGN = (first_BS[:, last, None, None] * (padding + 1) + list_BTHI[..., 1:].long() - 1) * total
    probed_BGN = _by_group(probed_BGN, groups)
    age_BGN = _by_group((position_S - windows.local)[last, None, None].expand_as(list_BTHI[..., 1:]), groups)
    opened_BGN = torch.searchsorted(sorted_BGS, probed_BGN)
    stop_BGN = torch.searchsorted(sorted_BGS, probed_BGN + age_BGN, right=True)
    shape = (batch, groups, length, -1, list_BTHI.shape[-1] - 1)
    stop_BTHJ, opened_BTHJ = (
        part.view(shape).transpose(1, 2).flatten(2, 3) for part in (torch.maximum(stop_BGN, opened_BGN), opened_BGN)
    )
    window_J = torch.full((list_BTHI.shape[-1] - 1,), windows.bucket, device=marked_BGS.device)
    window_J[0] = windows.sinks
    start_BTHJ = torch.maximum(opened_BTHJ, stop_BTHJ - window_J)

    local_BTH1 = [
        part[:, :, None, None].expand(*list_BTHI.shape[:3], 1) for part in (local_start_BT, so_far_BS[:, last])
    ]
    start = torch.cat((local_BTH1[0], start_BTHJ + total), -1)
    stop = torch.cat((local_BTH1[1], stop_BTHJ + total), -1)
    natural_BGS = (~real_BS).int().argsort(dim=-1, stable=True)[:, None].expand_as(order_BGS)
    spare_BGZ = order_BGS.new_zeros(batch, groups, SPARE)
    start = torch.where(real_BS[:, last, None, None], start, stop)  # a padding query looks at nothing
    return torch.cat((natural_BGS, order_BGS, spare_BGZ), -1), start.int(), stop.int()


def _by_group(part_BTHJ: Tensor, groups: int) -> Tensor:
    """Return `[B, G, N]`, the queries of each key/value head in a row."""
    return part_BTHJ.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2).contiguous()
