"""LSH attention: each query looks at its neighbourhood and at recent keys that its hash calls
alike.

`lsh_attention` is the one entry. `reference.py` says what it computes; the equivalence tests hold
them together.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek.kernels.bias.score_bias import ScoreBias
from deepseek.kernels.lsh import tiles
from deepseek.kernels.lsh.decode import BucketCache
from deepseek.kernels.lsh.far_field import merge_far_field
from deepseek.kernels.lsh.intervals import Windows, document_starts, find_intervals
from deepseek.kernels.numba import openmp

Codes = tuple[Tensor, Tensor, Tensor | None, Windows]  # the arguments of `find_intervals`


def lsh_attention(
    query_BHTK: Tensor,
    key_BGSK: Tensor,
    value_BGSK: Tensor,
    query_codes_BHTP: Tensor,
    key_codes_BJS: Tensor,
    *,
    num_buckets: int,
    bucket_window: int,
    local_window: int = 128,
    sinks: int = 4,
    scale: float | None = None,
    document_ids_BS: Tensor | None = None,
    key_mask_BS: Tensor | None = None,
    bias: ScoreBias | None = None,
    far_field: bool = False,
) -> Tensor:
    """Return causal softmax attention `[B, H, T, K]` over each query's candidates; zero where there
    are none.

    Time and memory grow as the number of tokens. What a query sees depends on nothing after it, and
    on a processor its result does not either, to the last bit.

    Args:
        query_BHTK: queries of the last T of S positions, H a multiple of G.
        query_codes_BHTP: the buckets that each query probes, 0 to `num_buckets` - 1; with several
            rounds of hashing equally many of each round, one round after the other. Those of a
            round are all different.
        key_codes_BJS: bucket of each key, J = GR: in each of R rounds, those of one key head side
            by side.
        bucket_window: most recent keys of a probed bucket that a query looks at.
        local_window: most recent keys, itself included, that a query looks at whatever their
            bucket.
        sinks: keys at the start of its document that a query always looks at (arXiv:2309.17453).
        scale: factor of the scores (default `K ** -0.5`).
        document_ids_BS: document of each token in packed rows, equal in runs.
        key_mask_BS: False at padding, which nobody sees and which sees nobody.
        bias: what is added to the scores; not together with a far field.
        far_field: whether to look at summaries of the rest, too (see `far_field.py`).
    """
    rounds = key_codes_BJS.shape[1] // key_BGSK.shape[1]
    windows = Windows(local_window, sinks, bucket_window, num_buckets, rounds, far_field)
    first_BS = document_starts(document_ids_BS)
    buckets = BucketCache(windows)
    buckets.append(key_codes_BJS, key_mask_BS, first_BS)
    return attend(
        query_BHTK, key_BGSK, value_BGSK, query_codes_BHTP, buckets, first_BS, scale, bias
    )


def attend(
    query_BHTK: Tensor,
    key_BGSK: Tensor,
    value_BGSK: Tensor,
    query_codes_BHTP: Tensor,
    buckets: BucketCache,
    first_BS: Tensor | None,
    scale: float | None = None,
    bias: ScoreBias | None = None,
) -> Tensor:
    """Do what `lsh_attention` does, with all keys in `buckets`; `first_BS` as
    `intervals.document_starts` says.
    """
    scale = query_BHTK.shape[-1] ** -0.5 if scale is None else scale
    windows = buckets.windows
    query = query_BHTK if bias is None else bias.scaled(query_BHTK)
    table, term = (None, None) if bias is None else bias.terms(query_BHTK, key_BGSK.shape[2])
    codes = (query_codes_BHTP.int(), buckets.codes_BJS, first_BS, windows)
    out, lse = _Attention.apply(query, key_BGSK, value_BGSK, table, term, codes, scale)
    if buckets.sums is None:
        return out
    buckets.sums.append(key_BGSK, value_BGSK, buckets.real_BS)
    return merge_far_field(
        (out, lse), query * scale, buckets.sums, windows.local, first_BS, buckets.real_BS
    )


@torch.no_grad()
def likeliest(scores: Tensor, probes: int) -> Tensor:
    """Return the indices `[..., probes]`, int64, of the largest scores `[..., C]`, largest first,
    as `torch.topk` does.

    Scores are finite.
    """
    compiling = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    if (
        compiling
        or scores.device.type != "cpu"
        or scores.dtype != torch.float32
        or openmp.runtime() is None
    ):
        return scores.topk(probes).indices
    from deepseek.kernels.lsh import probes as kernel

    return kernel.likeliest(scores, probes)


def _kernels(query_BHTK: Tensor) -> Any:
    """Return the module that does the work: compiled kernels where they can, else torch's
    operators.
    """
    dtypes = (torch.float32, torch.bfloat16)
    if (
        query_BHTK.device.type != "cpu"
        or query_BHTK.dtype not in dtypes
        or query_BHTK.shape[-1] % 16
    ):
        return tiles
    if openmp.runtime() is None:
        return tiles
    from deepseek.kernels.lsh import strips  # it imports numba, which nothing else needs

    return strips


class _Attention(torch.autograd.Function):
    """Keeps inputs, output and denominators for the backward pass; intervals and scores are
    computed again.

    Returns the logarithms of the denominators too. The bias is a table `[B, H, T, 32]` in fp32 and
    a term of each key `[B, H, S]` in fp64, or two times None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor | None,
        term: Tensor | None,
        codes: Codes,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        inputs = (query, key, value, table, term)
        out, lse = _kernels(query).forward(inputs, find_intervals(*codes), codes[-1], scale)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.codes = codes
        ctx.scale = scale
        return out.to(query.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        kernels = _kernels(inputs[0])
        intervals = find_intervals(*ctx.codes)
        grads = kernels.backward(
            grad, grad_lse, inputs, out, lse, intervals, ctx.codes[-1], ctx.scale
        )
        return (
            *(
                part.to(own.dtype) if own is not None else None
                for part, own in zip(grads, inputs, strict=True)
            ),
            None,
            None,
        )
