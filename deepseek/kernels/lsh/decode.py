"""LSH attention for one new token a step, with work that does not grow with the number of cached tokens.

Each bucket keeps the positions of its most recent keys in a ring; a step moves one key, the one that leaves the local
window, into its bucket's ring. The candidates are those of `attention.lsh_attention` to the last key.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek.kernels.lsh.intervals import Windows


class BucketCache:
    """Buckets of the keys of one layer in the cache.

    Attributes:
        codes_BGS: codes of the keys so far, int32; `num_buckets` at sinks and `num_buckets + 1` at padding.
        seen_B: number of real tokens so far.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows, self.length = windows, 0
        self.seen_B: Tensor | None = None
        self._room_BGS: Tensor | None = None  # codes with room for more, so that a step does not copy them
        self._ring_BGCW: Tensor | None = None  # positions, C buckets and W places; built at the first single step
        self._count_BGC: Tensor | None = None  # keys that have entered each bucket so far

    @property
    def codes_BGS(self) -> Tensor:
        assert self._room_BGS is not None
        return self._room_BGS[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        parts = (self.seen_B, self._room_BGS, self._ring_BGCW, self._count_BGC)
        return sum(part.nbytes for part in parts if part is not None)

    def append(self, key_codes_BGT: Tensor, real_BT: Tensor | None = None, first_BT: Tensor | None = None) -> None:
        """Add new keys.

        Args:
            real_BT: False at padding.
            first_BT: index of the first token of each token's document; only if there are no keys yet.
        """
        batch, groups, added = key_codes_BGT.shape
        ones_BT = key_codes_BGT.new_ones(batch, added) if real_BT is None else real_BT.long()
        seen_B1 = ones_BT.new_zeros(batch, 1) if self.seen_B is None else self.seen_B[:, None]
        rank_BT = seen_B1 + ones_BT.cumsum(1) - ones_BT
        self.seen_B = seen_B1[:, 0] + ones_BT.sum(1)
        if first_BT is not None:
            rank_BT = rank_BT - rank_BT.gather(1, first_BT)
        total = self.length + added
        if self._room_BGS is None or total > self._room_BGS.shape[2]:
            room = key_codes_BGT.new_empty(batch, groups, 2 * total, dtype=torch.int32)
            if self._room_BGS is not None:
                room[:, :, : self.length] = self.codes_BGS
            self._room_BGS = room
        self._room_BGS[:, :, self.length : total] = self._mark(key_codes_BGT, ones_BT, rank_BT)
        self.length = total
        if added == 1 and self._ring_BGCW is not None:
            self._push(total - 1 - self.windows.local)
        else:
            self._ring_BGCW = None

    def candidates(self, query_codes_BH1P: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places of keys outside the local window that the newest query looks at, and which count.

        Both are `[B, G, N, W]` for N buckets, the sinks' first, of all the queries that share a key head.
        """
        if self._ring_BGCW is None:
            self._build()
        assert self._ring_BGCW is not None and self._count_BGC is not None
        (batch, groups, _, places), sinks = self._ring_BGCW.shape, self.windows.num_buckets
        bucket_BHN = torch.cat(
            (query_codes_BH1P.new_full((*query_codes_BH1P.shape[:3], 1), sinks), query_codes_BH1P), -1
        )
        bucket_BGN = bucket_BHN.view(batch, groups, -1).long()
        position_BGNW = self._ring_BGCW.gather(2, bucket_BGN[..., None].expand(-1, -1, -1, places))
        count_BGN1 = self._count_BGC.gather(2, bucket_BGN)[..., None]
        age_BGNW = (count_BGN1 - 1 - torch.arange(places, device=count_BGN1.device)) % places
        limit_BGN = torch.where(bucket_BGN == sinks, self.windows.sinks, self.windows.bucket)
        return position_BGNW, age_BGNW < torch.minimum(count_BGN1, limit_BGN[..., None])

    def attend(
        self, query_BH1K: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, query_codes_BH1P: Tensor, scale: float
    ) -> Tensor:
        """Return the attention `[B, H, 1, K]` of the newest token, whose key is the last one."""
        query_BGRK = query_BH1K.view(*key_BGSK.shape[:2], -1, key_BGSK.shape[-1]) * scale
        shared, lowest = query_BGRK.shape[2], torch.finfo(query_BH1K.dtype).min
        position_BGNW, valid_BGNW = self.candidates(query_codes_BH1P)
        old = [_rows(part, position_BGNW).unflatten(2, (shared, -1)) for part in (key_BGSK, value_BGSK)]
        scores_old = (query_BGRK[..., None, :] @ old[0].mT).squeeze(-2)  # five times as fast as keys times query
        scores_old = scores_old.masked_fill(~valid_BGNW.view_as(scores_old), lowest)
        near = slice(max(0, self.length - self.windows.local), self.length)
        padding_BG1S = (self.codes_BGS[:, :, near] == self.windows.num_buckets + 1)[:, :, None]
        scores_near = (query_BGRK @ key_BGSK[:, :, near].mT).masked_fill(padding_BG1S, lowest)
        weights = torch.cat((scores_near, scores_old), -1).softmax(-1, dtype=torch.float32).to(value_BGSK.dtype)
        weights_near, weights_old = weights.tensor_split([scores_near.shape[-1]], -1)
        out_BGRK = weights_near @ value_BGSK[:, :, near] + (weights_old[..., None, :] @ old[1]).squeeze(-2)
        return out_BGRK.view_as(query_BH1K)

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change`, which picks, repeats or reorders sequences along the first axis, to all that is kept."""
        for name in ("seen_B", "_room_BGS", "_ring_BGCW", "_count_BGC"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else change(value))

    def crop(self, length: int) -> None:
        """Forget all keys from `length` on."""
        self.length, self._ring_BGCW = length, None
        self.seen_B = (self.codes_BGS[:, 0] != self.windows.num_buckets + 1).sum(-1)

    def _mark(self, key_codes_BGT: Tensor, ones_BT: Tensor, rank_BT: Tensor) -> Tensor:
        sink_B1T, padding_B1T = (rank_BT < self.windows.sinks)[:, None], (ones_BT == 0)[:, None]
        sinks_BGT = key_codes_BGT.masked_fill(sink_B1T, self.windows.num_buckets)
        return sinks_BGT.masked_fill(padding_B1T, self.windows.num_buckets + 1)

    def _push(self, position: int) -> None:
        """Let the key at `position` enter its bucket."""
        assert self._ring_BGCW is not None and self._count_BGC is not None
        if position >= 0:
            bucket_BG1 = self.codes_BGS[:, :, position, None].long()
            count_BG1 = self._count_BGC.gather(2, bucket_BG1)
            place_BG1 = bucket_BG1 * self._ring_BGCW.shape[3] + count_BG1 % self._ring_BGCW.shape[3]
            self._ring_BGCW.flatten(2).scatter_(2, place_BG1, position)
            self._count_BGC.scatter_(2, bucket_BG1, count_BG1 + 1)

    def _build(self) -> None:
        """Fill the rings with all keys that have left the newest token's local window."""
        windows = self.windows
        buckets, places = windows.num_buckets + 2, max(windows.bucket, windows.sinks)
        old_BGS = self.codes_BGS[:, :, : max(0, self.length - windows.local)].long()
        sorted_BGS, order_BGS = old_BGS.sort(dim=-1, stable=True)
        edges_BGC = torch.arange(buckets + 1, device=old_BGS.device).expand(*old_BGS.shape[:2], -1).contiguous()
        first_BGC = torch.searchsorted(sorted_BGS.contiguous(), edges_BGC)
        self._count_BGC = first_BGC.diff(dim=-1)
        rank_BGS = torch.arange(old_BGS.shape[2], device=old_BGS.device) - first_BGC.gather(2, sorted_BGS)
        recent_BGS = rank_BGS >= self._count_BGC.gather(2, sorted_BGS) - places
        place_BGS = torch.where(recent_BGS, sorted_BGS * places + rank_BGS % places, buckets * places)
        ring_BGN = old_BGS.new_zeros(*old_BGS.shape[:2], buckets * places + 1).scatter_(2, place_BGS, order_BGS)
        self._ring_BGCW = ring_BGN[..., :-1].unflatten(2, (buckets, places)).contiguous()


def _rows(x_BGSK: Tensor, position_BGNW: Tensor) -> Tensor:
    """Return the keys or values at the given positions, `[B, G, N * W, K]`."""
    batch, groups, total, width = x_BGSK.shape
    offset = torch.arange(batch * groups, device=x_BGSK.device).view(batch, groups, 1, 1) * total
    picked = x_BGSK.reshape(-1, width).index_select(0, (position_BGNW + offset).flatten())
    return picked.view(batch, groups, -1, width)
