"""Definition of LSH attention as a dense mask; the fast versions are tested against it.

Tensor names follow `deepseek.model`. P is the number of buckets that a query probes in each of R
rounds of hashing, and J = GR.
"""

import torch
from torch import Tensor

from deepseek.kernels.lsh.intervals import document_starts


def candidate_mask(
    query_codes_BHTP: Tensor,
    key_codes_BJS: Tensor,
    *,
    bucket_window: int,
    local_window: int = 128,
    sinks: int = 4,
    rounds: int = 1,
    document_ids_BS: Tensor | None = None,
    key_mask_BS: Tensor | None = None,
    exact_tokens: int = 0,
) -> Tensor:
    """Return the mask `[B, H, T, S]`, True where a query attends to a key.

    Within its document, and never at padding, a query at i attends to the keys j <= i with i - j <
    `local_window`. Among the older ones, it attends to the document's first `sinks` keys and, in
    each bucket that it probes, to the `bucket_window` most recent others. So a key enters its
    bucket when it leaves the local window. The first `exact_tokens` queries of a document attend to
    all older keys. Each round of hashing has its own buckets, and the candidates of all rounds are
    combined.

    Args:
        query_codes_BHTP, key_codes_BJS, bucket_window, local_window, sinks, document_ids_BS,
            key_mask_BS, exact_tokens: see `attention.lsh_attention`.
        rounds: number R of rounds of hashing.
    """
    (batch, heads, length, _), (_, rows, total) = query_codes_BHTP.shape, key_codes_BJS.shape
    device = key_codes_BJS.device
    real_BS = (
        torch.ones(batch, total, dtype=torch.bool, device=device)
        if key_mask_BS is None
        else key_mask_BS.bool()
    )
    start_BS = document_starts(
        torch.zeros_like(real_BS) if document_ids_BS is None else document_ids_BS
    )
    assert start_BS is not None
    keys_S = torch.arange(total, device=device)
    queries_T1 = keys_S[total - length :, None]
    same_BTS = start_BS[:, total - length :, None] == start_BS[:, None, :]
    seen_BTS = (
        same_BTS & (keys_S <= queries_T1) & real_BS[:, None, :] & real_BS[:, total - length :, None]
    )
    earlier_BS = real_BS.cumsum(-1) - real_BS.long()
    rank_BS = earlier_BS - earlier_BS.gather(1, start_BS)
    early_BT1 = rank_BS[:, total - length :, None] < exact_tokens
    near_BTS = seen_BTS & (early_BT1 | (queries_T1 - keys_S < local_window))
    sink_BS = rank_BS < sinks
    old_BTS = seen_BTS & ~near_BTS
    mask_BHTS = (near_BTS | old_BTS & sink_BS[:, None])[:, None].expand(-1, heads, -1, -1)
    for r, probed_BHTP in enumerate(query_codes_BHTP.chunk(rounds, -1)):
        codes_BH1S = key_codes_BJS[:, r::rounds].repeat_interleave(heads * rounds // rows, 1)[
            :, :, None
        ]
        for probed_BHT in probed_BHTP.unbind(-1):
            hits_BHTS = (old_BTS & ~sink_BS[:, None])[:, None] & (
                codes_BH1S == probed_BHT[..., None]
            )
            rank_BHTS = hits_BHTS.flip(-1).cumsum(-1).flip(-1)
            mask_BHTS = mask_BHTS | (hits_BHTS & (rank_BHTS <= bucket_window))
    return mask_BHTS


def masked_attention(
    query_BHTK: Tensor,
    key_BGSK: Tensor,
    value_BGSK: Tensor,
    mask_BHTS: Tensor,
    scale: float | None = None,
    added_BHTS: Tensor | None = None,
) -> Tensor:
    """Return softmax attention `[B, H, T, K]` over the keys in a mask; zero where the mask has
    none.

    Args:
        query_BHTK, key_BGSK, value_BGSK: queries, keys and values.
        mask_BHTS: True where a query attends to a key.
        scale: factor of the scores; default `K ** -0.5`.
        added_BHTS: added to the scores; None adds nothing.
    """
    share = query_BHTK.shape[1] // key_BGSK.shape[1]
    key, value = (part.repeat_interleave(share, 1) for part in (key_BGSK, value_BGSK))
    scale = query_BHTK.shape[-1] ** -0.5 if scale is None else scale
    scores = query_BHTK @ key.mT * scale
    scores = scores if added_BHTS is None else scores + added_BHTS
    scores = scores.masked_fill(~mask_BHTS, torch.finfo(query_BHTK.dtype).min)
    return scores.softmax(-1).masked_fill(~mask_BHTS, 0) @ value
