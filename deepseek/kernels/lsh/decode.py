"""LSH attention for decoding: one new token per step, with work independent of the number of cached
tokens.

Each bucket stores the positions of its most recent keys in a ring buffer. A step moves one key, the
one that leaves the local window, into its bucket's ring. The candidates are exactly those of
`attention.lsh_attention`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepseek.kernels.bias.distance import distance_buckets
from deepseek.kernels.bias.score_bias import ScoreBias
from deepseek.kernels.lsh.far_field import BLOCK, BlockSums
from deepseek.kernels.lsh.intervals import Windows


class BucketCache:
    """Hash buckets of the cached keys of one layer, as J = GR rows: the R rounds of a key head are
    adjacent.

    Args:
        windows: sizes of the windows.

    Attributes:
        length: number of keys so far.
        codes_BJS: codes of the keys, int32: `num_buckets` at sinks in the first round; `num_buckets
            + 1`, which no query probes, at sinks in other rounds and at padding.
        seen_B: number of real tokens so far.
        sums: block sums of the far field; None without one.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self.length = 0
        self.seen_B: Tensor | None = None
        self.sums = BlockSums() if windows.far_field else None
        # Codes with spare capacity, so that a step does not copy them.
        self._room_BJS: Tensor | None = None
        # Rings of W positions for each of C buckets; built at the first decoding step.
        self._ring_BJCW: Tensor | None = None
        self._count_BJC: Tensor | None = None  # keys that have entered each bucket so far

    @property
    def codes_BJS(self) -> Tensor:
        """Codes of the keys so far."""
        assert self._room_BJS is not None
        return self._room_BJS[:, :, : self.length]

    @property
    def real_BS(self) -> Tensor:
        """False at padding."""
        return self._real(slice(None))

    def _real(self, places: slice) -> Tensor:
        return self.codes_BJS[:, 0, places] != self.windows.num_buckets + 1

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        parts = (self.seen_B, self._room_BJS, self._ring_BJCW, self._count_BJC, self.sums)
        return sum(part.nbytes for part in parts if part is not None)

    @staticmethod
    def most_bytes(windows: Windows, groups: int, width: int, length: int) -> int:
        """Return the maximum memory of one sequence's buckets in bytes.

        It covers the codes with capacity to double, the rings and their counts.

        Args:
            windows: sizes of the windows.
            groups: key heads of the layer.
            width: numbers in a key.
            length: tokens of the sequence.
        """
        ring = (windows.num_buckets + 2) * (1 + max(windows.bucket, windows.sinks))
        total = groups * windows.rounds * (2 * 4 * length + 8 * ring) + 8
        if windows.far_field:
            total += (length // BLOCK + 1) * 8 * (groups * 2 * width + 1)
        return total

    def segment(self, start: int) -> "BucketCache":
        """Return a copy of the keys from `start` on.

        Rings and sums are not copied; they are rebuilt when needed.
        """
        copied = BucketCache(self.windows)
        copied._room_BJS = self.codes_BJS[:, :, start:].clone()
        copied.length = self.length - start
        copied.seen_B = copied.real_BS.sum(-1)
        return copied

    def extend(self, segment: "BucketCache") -> None:
        """Append the keys of `segment`, which was taken at this length."""
        self.append(segment.codes_BJS.long(), segment.real_BS)

    def append(
        self, key_codes_BJT: Tensor, real_BT: Tensor | None = None, first_BT: Tensor | None = None
    ) -> None:
        """Add new keys.

        Args:
            key_codes_BJT: codes of the new keys.
            real_BT: False at padding; None for no padding.
            first_BT: index of the first token of each token's document; only if there are no keys
                yet.
        """
        batch, rows, added = key_codes_BJT.shape
        ones_BT = key_codes_BJT.new_ones(batch, added) if real_BT is None else real_BT.long()
        seen_B1 = ones_BT.new_zeros(batch, 1) if self.seen_B is None else self.seen_B[:, None]
        rank_BT = seen_B1 + ones_BT.cumsum(1) - ones_BT
        self.seen_B = seen_B1[:, 0] + ones_BT.sum(1)
        if first_BT is not None:
            rank_BT = rank_BT - rank_BT.gather(1, first_BT)
        total = self.length + added
        room_BJS = self._code_memory(batch, rows, total, key_codes_BJT.device)
        room_BJS[:, :, self.length : total] = self._mark(key_codes_BJT, ones_BT, rank_BT)
        self.length = total
        if added == 1 and self._ring_BJCW is not None:
            self._push(total - 1 - self.windows.local)
        else:
            self._ring_BJCW = None

    def _code_memory(self, batch: int, rows: int, total: int, device: torch.device) -> Tensor:
        """Return the memory of the codes, with space for `total` keys."""
        if self._room_BJS is None or total > self._room_BJS.shape[2]:
            room = torch.empty(batch, rows, 2 * total, dtype=torch.int32, device=device)
            if self._room_BJS is not None:
                room[:, :, : self.length] = self.codes_BJS
            self._room_BJS = room
        return self._room_BJS

    def addresses(self) -> tuple[int, int, int, int]:
        """Count one more key, whose code the kernel of `decode_attention` will store; return the
        addresses of rings, counts and codes, and the capacity of the codes.

        Only for one sequence without padding, with at least one key in the cache.
        """
        if self._ring_BJCW is None:
            self._build()
        assert self._room_BJS is not None and self.seen_B is not None
        assert self._ring_BJCW is not None and self._count_BJC is not None
        batch, rows, _ = self._room_BJS.shape
        room = self._code_memory(batch, rows, self.length + 1, self._room_BJS.device)
        self.length += 1
        self.seen_B = self.seen_B + 1
        return (
            self._ring_BJCW.data_ptr(),
            self._count_BJC.data_ptr(),
            room.data_ptr(),
            room.shape[2],
        )

    def candidates(self, query_codes_BH1P: Tensor) -> tuple[Tensor, Tensor]:
        """Return the candidates of the newest query outside its local window.

        Args:
            query_codes_BH1P: the buckets that it probes.

        Returns:
            Positions and their validity, both `[B, G, N, W]`, for the N buckets, the sinks' first,
            of all queries that share a key head.
        """
        if self._ring_BJCW is None:
            self._build()
        assert self._ring_BJCW is not None and self._count_BJC is not None
        (batch, rows, _, places), sinks, rounds = (
            self._ring_BJCW.shape,
            self.windows.num_buckets,
            self.windows.rounds,
        )
        groups = rows // rounds
        codes_BGMRP = query_codes_BH1P.long().view(
            batch, groups, -1, rounds, query_codes_BH1P.shape[-1] // rounds
        )
        bucket_BGMRN = nn.functional.pad(codes_BGMRP, (1, 0), value=sinks)
        bucket_BJN = bucket_BGMRN.transpose(2, 3).reshape(batch, rows, -1)
        position_BJNW = self._ring_BJCW.gather(2, bucket_BJN[..., None].expand(-1, -1, -1, places))
        count_BJN1 = self._count_BJC.gather(2, bucket_BJN)[..., None]
        age_BJNW = (count_BJN1 - 1 - torch.arange(places, device=count_BJN1.device)) % places
        limit_BJN = torch.where(bucket_BJN == sinks, self.windows.sinks, self.windows.bucket)
        valid_BJNW = age_BJNW < torch.minimum(count_BJN1, limit_BJN[..., None])
        by_round = (batch, groups, rounds, *bucket_BGMRN.shape[2:3], -1, places)
        position, valid = (
            part.view(by_round).transpose(2, 3) for part in (position_BJNW, valid_BJNW)
        )
        if rounds > 1:
            valid = self._first_finds(position.flatten(3), valid.flatten(3)).view_as(valid)
        return position.flatten(2, 4), valid.flatten(2, 4)

    def _first_finds(self, position_BGMN: Tensor, valid_BGMN: Tensor) -> Tensor:
        """Return which valid positions of a query are the first occurrence."""
        sorted_BGMN, order_BGMN = torch.where(valid_BGMN, position_BGMN, self.length).sort(
            dim=-1, stable=True
        )
        new_BGMN = (
            sorted_BGMN.diff(dim=-1, prepend=sorted_BGMN.new_full((*sorted_BGMN.shape[:-1], 1), -1))
            != 0
        )
        return valid_BGMN & torch.empty_like(new_BGMN).scatter_(-1, order_BGMN, new_BGMN)

    def attend(
        self,
        query_BH1K: Tensor,
        key_BGSK: Tensor,
        value_BGSK: Tensor,
        query_codes_BH1P: Tensor,
        scale: float | None = None,
        bias: ScoreBias | None = None,
    ) -> Tensor:
        """Return the attention `[B, H, 1, K]` of the newest token, whose key is the last one.

        Args:
            query_BH1K: its queries.
            key_BGSK, value_BGSK: all keys and values, including its own.
            query_codes_BH1P: the buckets that it probes.
            scale: factor of the scores; default `K ** -0.5`.
            bias: added to the scores; None adds nothing.
        """
        scale = query_BH1K.shape[-1] ** -0.5 if scale is None else scale
        query_BH1K = query_BH1K if bias is None else bias.scaled(query_BH1K)
        query_BGMK = query_BH1K.view(*key_BGSK.shape[:2], -1, key_BGSK.shape[-1]) * scale
        shared = query_BGMK.shape[2]
        position_BGNW, valid_BGNW = self.candidates(query_codes_BH1P)
        old = [
            _rows(part, position_BGNW).unflatten(2, (shared, -1)) for part in (key_BGSK, value_BGSK)
        ]
        # Five times as fast as keys times query.
        scores_old = (query_BGMK[..., None, :] @ old[0].mT).squeeze(-2)
        # Under autocast the scores are of another dtype than the query.
        lowest = torch.finfo(scores_old.dtype).min
        scores_old = scores_old.masked_fill(~valid_BGNW.view_as(scores_old), lowest)
        near = slice(max(0, self.length - self.windows.local), self.length)
        padding_B11S = ~self._real(near)[:, None, None]
        scores_near = (query_BGMK @ key_BGSK[:, :, near].mT).masked_fill(padding_B11S, lowest)
        scores = torch.cat((scores_near, scores_old), -1)
        if bias is not None:
            scores = scores + self._added(
                bias, query_BH1K, near.start, position_BGNW.view_as(scores_old)
            )
        counts = [scores_near.shape[-1], scores.shape[-1]]
        if self.sums is not None:
            self.sums.append(key_BGSK, value_BGSK, self.real_BS)
            blocks_N = torch.tensor([near.start // BLOCK], device=scores.device)
            far_key, far_value, added_BNF, _ = self.sums.summaries(blocks_N, value_BGSK.dtype)
            scores = torch.cat(
                (scores, query_BGMK @ far_key[:, :, 0].mT + added_BNF[:, :, None]), -1
            )
        weights = scores.softmax(-1, dtype=torch.float32).to(value_BGSK.dtype)
        weights_near, weights_old, weights_far = weights.tensor_split(counts, -1)
        out_BGMK = weights_near @ value_BGSK[:, :, near] + (
            weights_old[..., None, :] @ old[1]
        ).squeeze(-2)
        if self.sums is not None:
            out_BGMK = out_BGMK + weights_far @ far_value[:, :, 0]
        return out_BGMK.view_as(query_BH1K)

    def _added(
        self, bias: ScoreBias, query_BH1K: Tensor, first: int, position_BGMN: Tensor
    ) -> Tensor:
        """Return the bias `[B, G, M, N]` of the newest query for the keys from `first` on, then for
        those at the given positions.
        """
        batch, groups, shared, _ = position_BGMN.shape
        near_BGMS = torch.arange(first, self.length, device=position_BGMN.device).expand(
            batch, groups, shared, -1
        )
        position_BHN = torch.cat((near_BGMS, position_BGMN), -1).flatten(1, 2)
        table_BH1N, term_BHS = bias.terms(query_BH1K, self.length)
        rank_BHS = self.real_BS.cumsum(-1)[:, None].expand_as(term_BHS)
        bucket_BHN = distance_buckets(rank_BHS[..., -1:] - rank_BHS.gather(2, position_BHN))
        added_BHN = table_BH1N[:, :, 0].gather(2, bucket_BHN) + (
            term_BHS.gather(2, position_BHN) - term_BHS[..., -1:]
        )
        return added_BHN.view(batch, groups, shared, -1)

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the batch.

        Args:
            change: selects, repeats or reorders sequences along the first axis.
        """
        for name in ("seen_B", "_room_BJS", "_ring_BJCW", "_count_BJC"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else change(value))
        if self.sums is not None:
            self.sums.change_rows(change)

    def crop(self, length: int) -> None:
        """Drop all keys from position `length` on."""
        self.length = length
        self._ring_BJCW = None
        self.seen_B = self.real_BS.sum(-1)
        if self.sums is not None:
            self.sums.crop(length)

    def _mark(self, key_codes_BJT: Tensor, ones_BT: Tensor, rank_BT: Tensor) -> Tensor:
        """Return the codes of new keys with those of sinks and padding replaced."""
        later_J = (
            torch.arange(key_codes_BJT.shape[1], device=ones_BT.device) % self.windows.rounds > 0
        )
        sinks_J1 = self.windows.num_buckets + later_J.to(key_codes_BJT.dtype)[:, None]
        sinks_BJT = torch.where((rank_BT < self.windows.sinks)[:, None], sinks_J1, key_codes_BJT)
        return sinks_BJT.masked_fill((ones_BT == 0)[:, None], self.windows.num_buckets + 1)

    def _push(self, position: int) -> None:
        """Insert the key at `position` into its bucket's ring."""
        assert self._ring_BJCW is not None and self._count_BJC is not None
        if position >= 0:
            bucket_BJ1 = self.codes_BJS[:, :, position, None].long()
            count_BJ1 = self._count_BJC.gather(2, bucket_BJ1)
            place_BJ1 = bucket_BJ1 * self._ring_BJCW.shape[3] + count_BJ1 % self._ring_BJCW.shape[3]
            self._ring_BJCW.flatten(2).scatter_(2, place_BJ1, position)
            self._count_BJC.scatter_(2, bucket_BJ1, count_BJ1 + 1)

    def _build(self) -> None:
        """Fill the rings with all keys that have left the newest token's local window."""
        windows = self.windows
        buckets = windows.num_buckets + 2
        places = max(windows.bucket, windows.sinks)
        old_BJS = self.codes_BJS[:, :, : max(0, self.length - windows.local)].long()
        sorted_BJS, order_BJS = old_BJS.sort(dim=-1, stable=True)
        edges_BJC = (
            torch.arange(buckets + 1, device=old_BJS.device)
            .expand(*old_BJS.shape[:2], -1)
            .contiguous()
        )
        first_BJC = torch.searchsorted(sorted_BJS.contiguous(), edges_BJC)
        self._count_BJC = first_BJC.diff(dim=-1)
        rank_BJS = torch.arange(old_BJS.shape[2], device=old_BJS.device) - first_BJC.gather(
            2, sorted_BJS
        )
        recent_BJS = rank_BJS >= self._count_BJC.gather(2, sorted_BJS) - places
        place_BJS = torch.where(
            recent_BJS, sorted_BJS * places + rank_BJS % places, buckets * places
        )
        ring_BJN = old_BJS.new_zeros(*old_BJS.shape[:2], buckets * places + 1).scatter_(
            2, place_BJS, order_BJS
        )
        self._ring_BJCW = ring_BJN[..., :-1].unflatten(2, (buckets, places)).contiguous()


def _rows(x_BGSK: Tensor, position_BGNW: Tensor) -> Tensor:
    """Return the keys or values at the given positions, `[B, G, N * W, K]`."""
    batch, groups, total, width = x_BGSK.shape
    offset = torch.arange(batch * groups, device=x_BGSK.device).view(batch, groups, 1, 1) * total
    picked = x_BGSK.reshape(-1, width).index_select(0, (position_BGNW + offset).flatten())
    return picked.view(batch, groups, -1, width)
