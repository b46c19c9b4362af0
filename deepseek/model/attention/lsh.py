"""LSH attention: each query looks at its neighbourhood, the first tokens, and recent keys that its hash calls alike.

`deepseek.kernels.lsh` computes it; here is how hash, heads, documents, padding and the cache come together.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.kernels.bias.score_bias import ScoreBias
from deepseek.kernels.lsh import attention as kernel
from deepseek.kernels.lsh.decode import BucketCache
from deepseek.kernels.lsh.intervals import Windows, document_starts
from deepseek.kernels.lsh.reference import candidate_mask, masked_attention
from deepseek.model.attention.full import FullAttention
from deepseek.model.config import ModelConfig
from deepseek.model.context import ForwardContext
from deepseek.model.kv_cache import layer_state


class Hash(Protocol):
    """Names the bucket of each key and the likeliest buckets of each query, of one layer.

    R rounds of hashing are R numbers for each key, those of a key head side by side `[B, GR, S]`, and `probes` numbers
    of each round, one round after the other, for each query `[B, H, T, RP]` (see `HashRounds`).
    """

    def key_codes(self, key_BGSK: Tensor) -> Tensor:
        """Return a bucket number `[B, G, S]` for each key, which depends on that key alone."""
        ...

    def query_codes(self, query_BHTK: Tensor, probes: int) -> Tensor:
        """Return `probes` different bucket numbers `[B, H, T, P]` for each query, the likeliest first."""
        ...


class HashRounds(nn.ModuleList):
    """Several hashes as one: a query looks at what any of them finds."""

    def key_codes(self, key_BGSK: Tensor) -> Tensor:
        return torch.stack([one.key_codes(key_BGSK) for one in list[Any](self)], 2).flatten(1, 2)

    def query_codes(self, query_BHTK: Tensor, probes: int) -> Tensor:
        return torch.cat([one.query_codes(query_BHTK, probes) for one in list[Any](self)], -1)


class RandomHash(nn.Module):
    """Random directions, one a bucket: a vector falls into the bucket whose direction is nearest (arXiv:1509.02897)."""

    directions_CK: Tensor

    def __init__(self, num_buckets: int, head_dim: int, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("directions_CK", torch.empty(num_buckets, head_dim), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        normal_CK = torch.randn(self.directions_CK.shape, generator=generator, device="cpu")
        self.directions_CK = nn.functional.normalize(normal_CK, dim=-1).to(self.directions_CK.dtype)

    def key_codes(self, key_BGSK: Tensor) -> Tensor:
        return self._likeness(key_BGSK).argmax(-1)

    def query_codes(self, query_BHTK: Tensor, probes: int) -> Tensor:
        return kernel.likeliest(self._likeness(query_BHTK), probes)

    def _likeness(self, x: Tensor) -> Tensor:
        return x.float() @ self.directions_CK.float().mT


def random_hash(num_buckets: int, head_dim: int, rounds: int, seed: int) -> Hash:
    """Return `RandomHash`es of seeds far from each other, so that neighbouring layers share none."""
    hashes = [RandomHash(num_buckets, head_dim, seed + 1000 * r) for r in range(rounds)]
    return hashes[0] if rounds == 1 else HashRounds(hashes)


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, num_buckets: int = 64, causal: bool = True, *, probes: int = 4,
    num_rounds: int = 1, bucket_window: int = 96, local_window: int = 128, sinks: int = 4, hash: Hash | None = None,  # noqa: A002
    seed: int = 0, far_field: bool = False, scale: float | None = None, document_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return attention in which each query looks at few keys, chosen by their hash; shape and dtype of `query`.

    Time and memory grow as the number of tokens. Each query looks at the last `local_window` keys, the first `sinks`
    ones, and the `bucket_window` most recent keys of each of its `probes` likeliest buckets. With one bucket and a
    window as long as the sequence, or a sequence within the local window, this is exact attention.

    Args:
        query: `[batch, heads, seq, head_dim]`; `[batch, seq, head_dim]` and `[seq, head_dim]` count as one head.
        key, value: likewise; fewer heads are shared by equal groups of query heads. If they are longer than the
            queries, the queries are those of their last tokens.
        causal: without it a query also looks at as many later keys, and at no summaries; that path makes a dense mask
            and is slow.
        num_rounds: independent hashes of this kind, each with its buckets and probes.
        hash: names buckets; default `RandomHash` of `seed`, good enough for clustered keys only.
        far_field: whether to look at summaries of all other past keys, too; then it is never exact attention.
        scale: factor of the scores (default `head_dim ** -0.5`).
        document_ids: document of each token `[batch, seq]` in packed rows; documents do not see each other.
        key_mask: False at padding `[batch, seq]`; its own outputs are zero.

    Raises:
        ConfigError: shapes or sizes contradict each other.
    """
    q, k, v = (_as_heads(part) for part in (query, key, value))
    _check(q, k, v, causal, num_buckets, min(probes, num_rounds), min(bucket_window, local_window))
    hasher = random_hash(num_buckets, q.shape[-1], num_rounds, seed) if hash is None else hash
    with torch.no_grad():
        query_codes, key_codes = hasher.query_codes(q, min(probes, num_buckets)), hasher.key_codes(k)
    limits: dict[str, Any] = {"bucket_window": bucket_window, "local_window": local_window, "sinks": sinks}
    if causal:
        out = kernel.lsh_attention(
            q, k, v, query_codes, key_codes, num_buckets=num_buckets, scale=scale, document_ids_BS=document_ids,
            key_mask_BS=key_mask, far_field=far_field, **limits,
        )  # fmt: skip
    else:
        limits |= {"rounds": key_codes.shape[1] // k.shape[1]}
        rows = [None if part is None else part.flip(-1) for part in (document_ids, key_mask)]
        past = candidate_mask(query_codes, key_codes, document_ids_BS=document_ids, key_mask_BS=key_mask, **limits)
        limits |= {"sinks": 0}
        future = candidate_mask(
            query_codes.flip(2), key_codes.flip(2), document_ids_BS=rows[0], key_mask_BS=rows[1], **limits
        )
        out = masked_attention(q, k, v, past | future.flip(2, 3), scale)
    return out.reshape(query.shape)


def _as_heads(part: Tensor) -> Tensor:
    if part.dim() not in (2, 3, 4):
        raise ConfigError(f"query, key and value have 2, 3 or 4 dimensions, not {part.dim()}.")
    return part if part.dim() == 4 else part[:, None] if part.dim() == 3 else part[None, None]


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, num_buckets: int, probes: int, window: int) -> None:
    shapes = f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ConfigError(f"The shapes do not fit each other as [batch, heads, seq, head_dim]: {shapes}.")
    if q.shape[2] > k.shape[2] or (not causal and q.shape[2] != k.shape[2]):
        raise ConfigError(f"There must be a key for every query, and without causal=True no more keys: {shapes}.")
    if min(num_buckets, probes, window) < 1:
        raise ConfigError("num_buckets, probes, num_rounds, bucket_window and local_window must be at least 1.")


class LshAttention(FullAttention):
    """Attention over the candidates of a hash; exact in the layers that `lsh_exact_layers` names.

    `hash` names the buckets; put a trained one there to replace the random one.
    """

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        for name in ("num_buckets", "probes", "rounds", "bucket_window", "local_window", "sinks"):
            least = 0 if name == "sinks" else 1
            value = getattr(config, f"lsh_{name}")
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"lsh_{name}={value!r} must be at least {least}.")
        if config.lsh_far_field and config.positional_encoding in ("alibi", "dpe"):
            raise ConfigError(
                f"lsh_far_field=True contradicts positional_encoding={config.positional_encoding!r}, as a summary of "
                "keys has no bias; leave lsh_far_field out."
            )
        if config.sliding_window is not None:
            raise ConfigError(
                f"sliding_window={config.sliding_window} contradicts attention='lsh', whose window is "
                "lsh_local_window; leave sliding_window out."
            )

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        exact = (0, 1) if config.lsh_exact_layers is None else config.lsh_exact_layers
        self.exact = layer_idx in exact
        self.windows = Windows(
            config.lsh_local_window, config.lsh_sinks, config.lsh_bucket_window, config.lsh_num_buckets,
            config.lsh_rounds, config.lsh_far_field,
        )  # fmt: skip
        self.probes = min(config.lsh_probes, config.lsh_num_buckets)
        if not self.exact:
            self.hash = random_hash(config.lsh_num_buckets, self.head_dim, config.lsh_rounds, seed=layer_idx)

    def attend(
        self, query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, plain: tuple[Tensor, Tensor],
        bias: ScoreBias | None, ctx: ForwardContext,
    ) -> Tensor:  # fmt: skip
        length, total = query_BHTK.shape[2], key_BGSK.shape[2]
        if self.exact or (ctx.cache is None and total <= self.windows.local):
            return super().attend(query_BHTK, key_BGSK, value_BGSK, plain, bias, ctx)
        with torch.no_grad():
            # Before positions: rotated keys would fall into buckets by place, not by content.
            buckets = layer_state(ctx.cache, self.layer_idx, BucketCache, self._no_buckets, "LSH attention needs")
            first_BS = document_starts(ctx.document_ids_BT)
            buckets.append(self.hash.key_codes(plain[1]), ctx.token_mask_BT, first_BS)
            if total <= self.windows.local:
                return super().attend(query_BHTK, key_BGSK, value_BGSK, plain, bias, ctx)
            query_codes_BHTP = self.hash.query_codes(plain[0], self.probes)
        if length == 1:
            return buckets.attend(query_BHTK, key_BGSK, value_BGSK, query_codes_BHTP, bias=bias)
        return kernel.attend(query_BHTK, key_BGSK, value_BGSK, query_codes_BHTP, buckets, first_BS, bias=bias)

    def state_bytes(self, length: int, itemsize: int) -> int:
        kept = super().state_bytes(length, itemsize)
        return kept if self.exact else kept + BucketCache.most_bytes(self.windows, self.groups, self.head_dim, length)

    def _no_buckets(self) -> BucketCache:
        return BucketCache(self.windows)
