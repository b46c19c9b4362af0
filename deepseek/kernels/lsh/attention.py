"""LSH attention: each query attends to its local window and to recent keys in the hash buckets that
it probes.

`lsh_attention` is the entry point. `reference.py` defines the result; the equivalence tests compare
them.
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
    exact_tokens: int = 0,
) -> Tensor:
    """Return causal softmax attention over each query's candidate keys.

    Time and memory are linear in the number of tokens. A query's candidates do not depend on later
    tokens; on a CPU, neither does its result, bit for bit.

    Args:
        query_BHTK: queries of the last T of S positions; H is a multiple of G.
        key_BGSK, value_BGSK: keys and values.
        query_codes_BHTP: the buckets that each query probes, 0 to `num_buckets` - 1. With several
            rounds of hashing, an equal number for each round, round after round. The buckets of a
            round are distinct.
        key_codes_BJS: bucket of each key, J = GR: the R rounds of a key head are adjacent.
        num_buckets: number of buckets of a round.
        bucket_window: number of most recent keys of a probed bucket that a query attends to.
        local_window: number of most recent keys, including its own, that a query attends to
            regardless of their bucket.
        sinks: number of keys at the start of its document that a query always attends to
            (arXiv:2309.17453).
        scale: factor of the scores; default `K ** -0.5`.
        document_ids_BS: document of each token in packed rows, as runs of equal ids; None for one
            document per row.
        key_mask_BS: False at padding, which neither attends nor is attended to; None for no
            padding.
        bias: added to the scores; not supported together with a far field.
        far_field: whether to attend to summaries of all other keys, too (see `far_field.py`).
        exact_tokens: number of queries at the start of a document that attend to all keys before
            them; 0 with a far field.

    Returns:
        Attended values `[B, H, T, K]`; zero where a query has no candidates.
    """
    rounds = key_codes_BJS.shape[1] // key_BGSK.shape[1]
    windows = Windows(
        local_window, sinks, bucket_window, num_buckets, rounds, far_field, exact_tokens
    )
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
    """Compute `lsh_attention` with the codes of all keys in `buckets`.

    Args:
        query_BHTK, key_BGSK, value_BGSK, query_codes_BHTP, scale, bias: see `lsh_attention`.
        buckets: codes of all keys so far.
        first_BS: see `intervals.document_starts`.
    """
    scale = query_BHTK.shape[-1] ** -0.5 if scale is None else scale
    windows = buckets.windows
    query = query_BHTK if bias is None else bias.scaled(query_BHTK)
    table, term = (None, None) if bias is None else bias.terms(query_BHTK, key_BGSK.shape[2])
    codes = (query_codes_BHTP.int(), buckets.codes_BJS, first_BS, windows)
    # Under autocast the tables of rotary positions leave queries and keys in fp32, but not values.
    key, value = (part.to(query.dtype) for part in (key_BGSK, value_BGSK))
    out, lse = _Attention.apply(query, key, value, table, term, codes, scale)
    if buckets.sums is None:
        return out
    buckets.sums.append(key_BGSK, value_BGSK, buckets.real_BS)
    return merge_far_field(
        (out, lse), query * scale, buckets.sums, windows.local, first_BS, buckets.real_BS
    )


HASHED = 512
"""Tokens that are hashed at once, so that their scores stay in the cache."""


@torch.no_grad()
def likeliest_buckets(
    x_BHTK: Tensor, weight_KC: Tensor, bias_C: Tensor | None, probes: int
) -> Tensor:
    """Return the buckets with the largest `x @ weight + bias` in fp32, largest first.

    Args:
        x_BHTK: queries or keys.
        weight_KC, bias_C: map to the scores of buckets, for all heads or, with further dimensions
            in front, for each of them; None for no bias.
        probes: number of buckets.

    Returns:
        Buckets `[B, H, T, probes]`, int64.
    """

    def of(part: Tensor) -> Tensor:
        with torch.autocast(part.device.type, enabled=False):
            scores = part.float() @ weight_KC
        return likeliest(scores if bias_C is None else scores + bias_C, probes)

    tracing = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    if x_BHTK.device.type != "cpu" or tracing:
        return of(x_BHTK)
    return torch.cat([of(part) for part in x_BHTK.split(HASHED, dim=2)], dim=2)


@torch.no_grad()
def likeliest(scores: Tensor, probes: int) -> Tensor:
    """Return the indices of the largest scores, largest first, as `torch.topk` does.

    Args:
        scores: finite scores `[..., C]`.
        probes: number of indices.

    Returns:
        Indices `[..., probes]`, int64.
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
    """Return the module that computes the attention: compiled kernels if they support it, else
    torch's operators.
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
    # Imported here because it imports numba, which nothing else needs.
    from deepseek.kernels.lsh import strips

    return strips


class _Attention(torch.autograd.Function):
    """Attention over intervals; returns the attended values and the logarithms of the denominators.

    Inputs, output and denominators are saved for the backward pass, which recomputes intervals and
    scores. The bias is a table `[B, H, T, 32]` in fp32 and a term of each key `[B, H, S]` in fp64,
    or both are None. Autocast is off in both passes, which must compute the same scores.
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
        intervals = find_intervals(*codes)
        with torch.autocast(query.device.type, enabled=False):
            out, lse = _kernels(query).forward(inputs, intervals, codes[-1], scale)
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
        with torch.autocast(grad.device.type, enabled=False):
            grads = kernels.backward(
                grad, grad_lse, inputs, out, lse, intervals, ctx.codes[-1], ctx.scale
            )
        return (
            *(
                part.to(source.dtype) if source is not None else None
                for part, source in zip(grads, inputs, strict=True)
            ),
            None,
            None,
        )
