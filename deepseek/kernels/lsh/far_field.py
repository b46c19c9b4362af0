"""What lies beyond a query's candidates, in few summaries: mean keys and values of blocks that
double with distance.

A row is cut into blocks of `BLOCK` slots. Of the blocks whose keys have all left the local window,
a query sees the latest ones alone, earlier ones by twos, fours and so on, each as one key with the
logarithm of its number of keys added to its score, which is what equal keys would weigh. Only what
is complete counts, so nothing depends on later tokens. Candidates are not taken out of the means,
although a pair is looked at twice then: measured, that is nearer to exact attention than taking
them out, perhaps because a mean key underrates its block.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

BLOCK = 64
PER_LEVEL = 2
"""Summaries of each size that a query sees at least, or PER_LEVEL + 1."""

LOWEST = -1e30


class BlockSums:
    """Sums over the first M blocks of a row, for M from 0 to the number of complete ones.

    Attributes:
        sums_BGMK: of keys and values, side by side, in fp64.
        count_BM: number of real keys.
    """

    def __init__(self) -> None:
        self.sums_BGMK: Tensor | None = None
        self.count_BM: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.sums_BGMK, self.count_BM) if part is not None)

    def append(self, key_BGSK: Tensor, value_BGSK: Tensor, real_BS: Tensor) -> None:
        """Add the blocks that have become complete; given are all keys and values so far."""
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
        """Apply `change`, which picks, repeats or reorders sequences along the first axis."""
        if self.sums_BGMK is not None and self.count_BM is not None:
            self.sums_BGMK = change(self.sums_BGMK)
            self.count_BM = change(self.count_BM)

    def crop(self, length: int) -> None:
        """Forget all keys from `length` on."""
        if self.sums_BGMK is not None and self.count_BM is not None:
            kept = slice(length // BLOCK + 1)
            self.sums_BGMK = self.sums_BGMK[:, :, kept]
            self.count_BM = self.count_BM[:, kept]

    def summaries(
        self, blocks_N: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what those see who have so many complete blocks behind them, F summaries each.

        Returns keys and values `[B, G, N, F, K]`, what is added to their scores `[B, N, F]`, and
        the slot of the first key of each `[N, F]`.
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
    """Return first block and the one past the last of each summary of the first `blocks_N` <=
    `most` blocks, `[N, F]`.

    The latest come first; some are empty.
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
        query_BHTK: queries of the last T of S slots, times the factor of scores.
        local: keys of the local window.
        first_BS: see `intervals.document_starts`.
        real_BS: False at padding.
    """
    out_BHTK, lse_BHT = near
    (batch, heads, length, width), total = query_BHTK.shape, real_BS.shape[1]
    assert sums.sums_BGMK is not None
    groups = sums.sums_BGMK.shape[1]
    # Queries with equally many complete blocks, of which there are `BLOCK`, stand together.
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
    first_BT = torch.where(real_BS, first_BT, total)[
        :, total - length :
    ]  # padding looks at nothing
    first_BNM = nn.functional.pad(first_BT, around).view(batch, count, BLOCK)
    hidden_BNMF = slot_NF[:, None] < first_BNM[..., None]
    scores = (query @ key[:, :, None].mT).to(lse_BHT.dtype) + added_BNF[:, None, None, :, None]
    scores = scores.masked_fill(hidden_BNMF[:, None, None], LOWEST)
    far = scores.softmax(-1).to(value.dtype) @ value[:, :, None]
    parts = (part.reshape(batch, heads, count * BLOCK, -1) for part in (far, scores.logsumexp(-1)))
    far_BHTK, lse_BHT1 = (part[:, :, before : before + length] for part in parts)
    share_BHT1 = torch.sigmoid(lse_BHT1 - lse_BHT[..., None]).masked_fill(lse_BHT1 < LOWEST / 2, 0)
    return (out_BHTK * (1 - share_BHT1) + far_BHTK * share_BHT1).to(out_BHTK.dtype)
