"""LSH attention as a function of queries, keys and values."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deepseek import checks
from deepseek.checks import flag, whole
from deepseek.errors import ConfigError
from deepseek.kernels.lsh import attention as kernel
from deepseek.kernels.lsh.reference import candidate_mask, masked_attention
from deepseek.model.attention.lsh import Hash, random_hash

MAX_BUCKETS = 1 << 16
MAX_ROUNDS = 64
EXACT_TOKENS = 2048
"""Position from which on a query is faster with LSH attention than with exact attention, in bf16 on
AMX; in fp32 and on other processors it is lower. It is a constant so that results do not depend on
the processor, the dtype or the length of the text.
"""


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_buckets: int = 64,
    causal: bool = True,
    *,
    probes: int = 4,
    num_rounds: int = 1,
    bucket_window: int = 96,
    local_window: int = 128,
    sinks: int = 4,
    hash: Hash | None = None,  # noqa: A002
    seed: int = 0,
    far_field: bool = False,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    exact_tokens: int | None = None,
) -> Tensor:
    """Return sparse attention over keys selected by locality-sensitive hashing.

    Time and memory are linear in the number of tokens. The first `exact_tokens` queries attend to
    all keys before them: that early in a text, exact attention is faster. Each other query attends
    to the last `local_window` keys, the first `sinks` keys, and the `bucket_window` most recent
    keys of each of its `probes` most likely buckets. The result equals exact attention if the
    sequence fits into the local window, or with one bucket and a bucket window as long as the
    sequence.

    Args:
        query: `[batch, heads, seq, head_dim]`; `[batch, seq, head_dim]` and `[seq, head_dim]` are
            read as one head.
        key, value: the same layout, with as many heads or fewer (grouped-query attention). If they
            have more tokens than `query`, the queries are those of the last tokens.
        num_buckets: number of buckets per hash.
        causal: False lets a query also attend to as many later keys, without the far field. That
            path builds a dense mask and is slow.
        probes: number of buckets that a query probes, per hash.
        num_rounds: number of independent hashes, each with its own buckets and probes.
        bucket_window: number of most recent keys per probed bucket.
        local_window: number of most recent keys, in any bucket.
        sinks: number of first keys of the document, in any bucket.
        hash: the hash to use; None: a `RandomHash`, which suits clustered keys only.
        seed: seed of the `RandomHash`.
        far_field: whether to attend to summaries of all other past keys as well. The result is then
            never exact.
        scale: factor on the scores; None: `head_dim ** -0.5`.
        document_ids: document of each token `[batch, seq]` in packed rows; tokens attend only
            within their document. None: one document per row.
        key_mask: False at padding, `[batch, seq]`; outputs at padding are zero. None: no padding.
        exact_tokens: number of queries at the start of a document that attend to all keys before
            them. None: `EXACT_TOKENS`, or 0 with a far field or without `causal`, which exclude it.

    Returns:
        A tensor with the shape and dtype of `query`, also under autocast.

    Raises:
        ConfigError: a size is out of range; tensors are empty, of a wrong shape, not floating
            point, of several dtypes or devices, or hold NaN or infinity.
    """
    for name, part in {"query": query, "key": key, "value": value}.items():
        checks.tensor(name, part, "real", dims=(2, 3, 4))
        checks.finite(name, part)
    checks.alike(query=query, key=key, value=value)
    q, k, v = (_as_heads(part) for part in (query, key, value))
    flag("causal", causal)
    flag("far_field", far_field)
    checks.optional(checks.number)("scale", scale)
    _check_shapes(q, k, v, causal)
    _check_rows(k, document_ids, key_mask)
    num_buckets = whole("num_buckets", num_buckets, least=1, most=MAX_BUCKETS)
    probes = whole("probes", probes, least=1)
    num_rounds = whole("num_rounds", num_rounds, least=1, most=MAX_ROUNDS)
    seed = whole("seed", seed, least=0, most=checks.MAX_SEED)
    for method in ("query_codes", "key_codes") if hash is not None else ():
        checks.function(f"hash.{method}", getattr(hash, method, None))
    exact = _exact_tokens(exact_tokens, causal and not far_field)
    # Windows are clipped to the length of the text, because kernels count in int32.
    total = k.shape[2]
    limits: dict[str, Any] = {
        "bucket_window": min(whole("bucket_window", bucket_window, least=1), total),
        "local_window": min(whole("local_window", local_window, least=1), total),
        "sinks": min(whole("sinks", sinks, least=0), total),
        "exact_tokens": min(exact, total),
    }
    rows: dict[str, Any] = {"document_ids_BS": document_ids, "key_mask_BS": key_mask}
    early = limits["exact_tokens"]
    if q.shape[2] < total or document_ids is not None or key_mask is not None:
        early = 0  # left to the kernel, because torch's fast attention has no such masks
    elif early < total and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        early = 0  # gradients of two separate parts would take 50 % more memory
    if early == total:
        return _exact(q, k, v, scale).reshape(query.shape)
    if hash is None:
        made: Any = random_hash(num_buckets, q.shape[-1], num_rounds, seed)
        hash = made.to(q.device)  # noqa: A001
    hashed = partial(_codes, hash, min(probes, num_buckets), num_buckets)
    if not causal:
        return _both_ways(q, k, v, hashed(q, k), limits, rows, scale).reshape(query.shape)
    late = q[:, :, early:]
    query_codes, key_codes = hashed(late, k)
    with _without_autocast(q):
        out = kernel.lsh_attention(
            late,
            k,
            v,
            query_codes,
            key_codes,
            num_buckets=num_buckets,
            scale=scale,
            far_field=far_field,
            **rows,
            **limits,
        )
    if early:
        start = _exact(q[:, :, :early], k[:, :, :early], v[:, :, :early], scale)
        out = torch.cat([start, out], dim=2)
    return out.reshape(query.shape)


def _without_autocast(q: Tensor) -> torch.autocast:
    """Return a context that disables autocast, so that the dtype of a result is that of the inputs
    whatever the length.
    """
    return torch.autocast(q.device.type, enabled=False)


def _exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    with _without_autocast(q):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def _exact_tokens(exact_tokens: int | None, possible: bool) -> int:
    if exact_tokens is None:
        return EXACT_TOKENS if possible else 0
    exact_tokens = whole("exact_tokens", exact_tokens, least=0)
    if exact_tokens and not possible:
        raise ConfigError(
            f"exact_tokens={exact_tokens} contradicts far_field=True and causal=False; leave it out."
        )
    return exact_tokens


@torch.no_grad()
def _codes(
    hasher: Hash, probes: int, num_buckets: int, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the codes of queries and keys."""
    query_codes = hasher.query_codes(q, probes)
    key_codes = hasher.key_codes(k)
    _check_codes(query_codes, key_codes, q, k, num_buckets)
    return query_codes, key_codes


def _both_ways(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes: tuple[Tensor, Tensor],
    limits: dict[str, Any],
    rows: dict[str, Any],
    scale: float | None,
) -> Tensor:
    """Return attention that also looks ahead, with a dense mask."""
    query_codes, key_codes = codes
    options: dict[str, Any] = limits | {"rounds": key_codes.shape[1] // k.shape[1]}
    past = candidate_mask(query_codes, key_codes, **rows, **options)
    flipped: dict[str, Any] = {
        name: None if part is None else part.flip(-1) for name, part in rows.items()
    }
    options["sinks"] = 0
    future = candidate_mask(query_codes.flip(2), key_codes.flip(2), **flipped, **options)
    with _without_autocast(q):
        return masked_attention(q, k, v, past | future.flip(2, 3), scale)


def _as_heads(part: Tensor) -> Tensor:
    return part if part.dim() == 4 else part[:, None] if part.dim() == 3 else part[None, None]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    shapes = f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
    if (
        k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[-1] != k.shape[-1]
        or q.shape[1] % k.shape[1]
    ):
        raise ConfigError(
            f"The shapes do not fit each other as [batch, heads, seq, head_dim]: {shapes}."
        )
    if q.shape[2] > k.shape[2] or (not causal and q.shape[2] != k.shape[2]):
        raise ConfigError(
            f"There must be a key for every query, and without causal=True no more keys: {shapes}."
        )


def _check_rows(k: Tensor, document_ids: Tensor | None, key_mask: Tensor | None) -> None:
    rows = (k.shape[0], k.shape[2])
    given = {"document_ids": (document_ids, "whole"), "key_mask": (key_mask, "mask")}
    for name, (part, kind) in given.items():
        if part is not None:
            checks.tensor(name, part, kind, dims=(2,))
            checks.shape(name, part, rows, "[batch, seq]")
    checks.same_device(key=k, document_ids=document_ids, key_mask=key_mask)


def _check_codes(
    query_codes: Tensor, key_codes: Tensor, q: Tensor, k: Tensor, num_buckets: int
) -> None:
    """Raise `ConfigError` unless a hash has put every query and key into buckets that exist."""
    checks.tensor("query_codes of the hash", query_codes, "whole", dims=(4,))
    checks.tensor("key_codes of the hash", key_codes, "whole", dims=(3,))
    groups = k.shape[1]
    rounds, left = divmod(key_codes.shape[1], groups)
    if (
        query_codes.shape[:3] != q.shape[:3]
        or (key_codes.shape[0], key_codes.shape[2]) != (k.shape[0], k.shape[2])
        or left
        or query_codes.shape[3] % max(rounds, 1)
    ):
        raise ConfigError(
            f"The hash returned codes of shape {tuple(query_codes.shape)} and "
            f"{tuple(key_codes.shape)}; they must be [batch, heads, seq, rounds * probes] and "
            "[batch, key heads * rounds, seq]."
        )
    for name, codes in {"query_codes": query_codes, "key_codes": key_codes}.items():
        checks.within(f"{name} of the hash", codes, 0, num_buckets - 1, "buckets")
