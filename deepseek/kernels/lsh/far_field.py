"""Far field: summaries of the keys beyond a query's candidates, as mean keys and values of blocks
that double in size with distance.

A row is divided into blocks of `BLOCK` slots. Of the blocks whose keys have all left the local
window, a query attends to the latest ones one by one, to earlier ones in groups of two, four and so
on. Each group is one key whose score is increased by the logarithm of its number of keys, which is
exact for equal keys. Only complete blocks count, so nothing depends on later tokens. Candidates are
not removed from the means, so such a pair counts twice: measured, this is closer to exact attention
than removing them, perhaps because a mean key underestimates its block.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

BLOCK = 64
PER_LEVEL = 2
"""Minimum number of summaries of each size that a query attends to; the maximum is one more."""

LOWEST = -1e30


class BlockSums:
    """Prefix sums over the first M blocks of a row, for M from 0 to the number of complete blocks.

    Attributes:
        sums_BGMK: sums of keys and values, concatenated, in fp64.
        count_BM: number of real keys.
    """

    def __init__(self) -> None:
        self.sums_BGMK: Tensor | None = None
        self.count_BM: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(part.nbytes for part in (self.sums_BGMK, self.count_BM) if part is not None)

    def append(self, key_BGSK: Tensor, value_BGSK: Tensor, real_BS: Tensor) -> None:
        """Add the blocks that have become complete.

        Args:
            key_BGSK, value_BGSK: all keys and values so far.
            real_BS: False at padding.
        """
        known = 0 if self.count_BM is None else self.count_BM.shape[1] - 1
        new = slice(known * BLOCK, key_BGSK.shape[2] // BLOCK * BLOCK)
        if self.count_BM is not None and new.start == new.stop:
            return
        both_BGSK = (
            torch.cat((key_BGSK[:, :, new], value_BGSK[:, :, new]), -1)
            * real_BS[:, None, new, None]
        )
        sums_BGMK = both_BGSK.unflatten(2, (-1, BLOCK)).sum(3, dtype=torch.float64).cumsum(2)
        count_BM = real_BS[:, new].unflatten(1, (-1, BLOCK)).sum(2).cumsum(1)
        if self.sums_BGMK is None or self.count_BM is None:
            self.sums_BGMK = nn.functional.pad(sums_BGMK, (0, 0, 1, 0))
            self.count_BM = nn.functional.pad(count_BM, (1, 0))
        else:
            self.sums_BGMK = torch.cat((self.sums_BGMK, self.sums_BGMK[:, :, -1:] + sums_BGMK), 2)
            self.count_BM = torch.cat((self.count_BM, self.count_BM[:, -1:] + count_BM), 1)

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the batch.

        Args:
            change: selects, repeats or reorders sequences along the first axis.
        """
        if self.sums_BGMK is not None and self.count_BM is not None:
            self.sums_BGMK = change(self.sums_BGMK)
            self.count_BM = change(self.count_BM)

    def crop(self, length: int) -> None:
        """Drop all keys from position `length` on."""
        if self.sums_BGMK is not None and self.count_BM is not None:
            remaining = slice(length // BLOCK + 1)
            self.sums_BGMK = self.sums_BGMK[:, :, remaining]
            self.count_BM = self.count_BM[:, remaining]

    def summaries(
        self, blocks_N: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the F summaries for queries with `blocks_N` complete blocks behind them.

        Args:
            blocks_N: number of complete blocks, for each of N groups of queries.
            dtype: dtype of the keys and values.

        Returns:
            Keys and values `[B, G, N, F, K]`, terms to add to their scores `[B, N, F]`, and the
            slot of the first key of each summary `[N, F]`.
        """
        assert self.sums_BGMK is not None and self.count_BM is not None
        first_NF, last_NF = edges(blocks_N, self.count_BM.shape[1] - 1)
        count_BNF = self.count_BM[:, last_NF] - self.count_BM[:, first_NF]
        sums_BGNFK = self.sums_BGMK[:, :, last_NF] - self.sums_BGMK[:, :, first_NF]
        key, value = (
            (sums_BGNFK / count_BNF.clamp(min=1)[:, None, ..., None]).to(dtype).chunk(2, -1)
        )
        added_BNF = torch.where(count_BNF > 0, count_BNF.clamp(min=1).log(), LOWEST)
        return key, value, added_BNF, first_NF * BLOCK


def edges(blocks_N: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the first block of each summary, and the one past its last, `[N, F]`.

    Summaries are ordered from late to early; some are empty.

    Args:
        blocks_N: number of blocks to summarise, at most `most`.
        most: maximum number of blocks, which determines F.
    """
    rest_N = blocks_N
    edges_N = [blocks_N]
    size = 1
    while size <= max(most, 1):
        left_N = rest_N // size
        taken_N = torch.where(left_N > PER_LEVEL, PER_LEVEL + (left_N - PER_LEVEL) % 2, left_N)
        edges_N += [rest_N - size * taken_N.clamp(max=n + 1) for n in range(PER_LEVEL + 1)]
        rest_N = edges_N[-1]
        size = 2 * size
    edges_NF = torch.stack(edges_N, -1)
    return edges_NF[:, 1:], edges_NF[:, :-1]


def merge_far_field(
    near: tuple[Tensor, Tensor],
    query_BHTK: Tensor,
    sums: BlockSums,
    local: int,
    first_BS: Tensor | None,
    real_BS: Tensor,
) -> Tensor:
    """Return attention over candidates and summaries `[B, H, T, K]`.

    Args:
        near: attention over the candidates, and the logarithm of its denominator `[B, H, T]`.
        query_BHTK: queries of the last T of S slots, already scaled.
        sums: sums over all complete blocks.
        local: number of keys in the local window.
        first_BS: see `intervals.document_starts`.
        real_BS: False at padding.
    """
    out_BHTK, lse_BHT = near
    (batch, heads, length, width), total = query_BHTK.shape, real_BS.shape[1]
    assert sums.sums_BGMK is not None
    groups = sums.sums_BGMK.shape[1]
    # Group the queries by number of complete blocks; each group has `BLOCK` queries.
    oldest = total - length - local + 1
    before = oldest % BLOCK
    count = (oldest % BLOCK + length + BLOCK - 1) // BLOCK
    blocks_N = (torch.arange(count, device=query_BHTK.device) + oldest // BLOCK).clamp(min=0)
    key, value, added_BNF, slot_NF = sums.summaries(blocks_N, query_BHTK.dtype)
    around = (before, count * BLOCK - before - length)
    query = nn.functional.pad(query_BHTK, (0, 0, *around)).view(
        batch, groups, -1, count, BLOCK, width
    )
    first_BT = torch.zeros_like(real_BS, dtype=torch.long) if first_BS is None else first_BS
    # Padding queries attend to nothing.
    first_BT = torch.where(real_BS, first_BT, total)[:, total - length :]
    first_BNM = nn.functional.pad(first_BT, around).view(batch, count, BLOCK)
    hidden_BNMF = slot_NF[:, None] < first_BNM[..., None]
    scores = (query @ key[:, :, None].mT).to(lse_BHT.dtype) + added_BNF[:, None, None, :, None]
    scores = scores.masked_fill(hidden_BNMF[:, None, None], LOWEST)
    far = scores.softmax(-1).to(value.dtype) @ value[:, :, None]
    parts = (part.reshape(batch, heads, count * BLOCK, -1) for part in (far, scores.logsumexp(-1)))
    far_BHTK, lse_BHT1 = (part[:, :, before : before + length] for part in parts)
    share_BHT1 = torch.sigmoid(lse_BHT1 - lse_BHT[..., None]).masked_fill(lse_BHT1 < LOWEST / 2, 0)
    return (out_BHTK * (1 - share_BHT1) + far_BHTK * share_BHT1).to(out_BHTK.dtype)
