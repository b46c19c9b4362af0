"""LSH attention: a query attends to a local window, attention sinks, and keys with similar hashes.

The kernels are in `deepseek.kernels.lsh`. This file connects them to the hash, the heads, packed
documents, padding and the KV cache.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deepseek import checks
from deepseek.checks import MAX_SIZE, flag, whole
from deepseek.errors import ConfigError
from deepseek.kernels.bias.score_bias import ScoreBias
from deepseek.kernels.lsh import attention as kernel
from deepseek.kernels.lsh.decode import BucketCache
from deepseek.kernels.lsh.intervals import Windows, document_starts
from deepseek.kernels.lsh.reference import candidate_mask, masked_attention
from deepseek.model.attention.decode import decode, reserved_layers
from deepseek.model.attention.full import AttentionInputs, FullAttention
from deepseek.model.config import ModelConfig
from deepseek.model.context import ForwardContext
from deepseek.model.kv_cache import layer_state


class Hash(Protocol):
    """A hash of one layer: the bucket of each key and the buckets that each query probes.

    With R rounds of hashing, keys have codes `[B, GR, S]`, the rounds of a key head side by side,
    and queries have codes `[B, H, T, RP]`, round after round (see `HashRounds`).
    """

    def key_codes(self, key_BGSK: Tensor) -> Tensor:
        """Return the bucket `[B, G, S]` of each key, which must depend on that key only."""
        ...

    def query_codes(self, query_BHTK: Tensor, probes: int) -> Tensor:
        """Return `probes` distinct buckets `[B, H, T, P]` per query, most likely first."""
        ...


class HashRounds(nn.ModuleList):
    """Several independent hashes; a query attends to the union of their candidates."""

    def key_codes(self, key_BGSK: Tensor) -> Tensor:
        codes = [layer_hash.key_codes(key_BGSK) for layer_hash in list[Any](self)]
        return torch.stack(codes, 2).flatten(1, 2)

    def query_codes(self, query_BHTK: Tensor, probes: int) -> Tensor:
        codes = [layer_hash.query_codes(query_BHTK, probes) for layer_hash in list[Any](self)]
        return torch.cat(codes, -1)


class RandomHash(nn.Module):
    """A hash by random directions, one per bucket (arXiv:1509.02897).

    A vector goes into the bucket whose direction has the largest dot product with it.
    """

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
        return kernel.likeliest(self._similarity(key_BGSK), 1)[..., 0]

    def query_codes(self, query_BHTK: Tensor, probes: int) -> Tensor:
        return kernel.likeliest(self._similarity(query_BHTK), probes)

    def _similarity(self, x: Tensor) -> Tensor:
        return x.float() @ self.directions_CK.float().mT


def random_hash(num_buckets: int, head_dim: int, rounds: int, seed: int) -> Hash:
    """Return a `RandomHash` of `rounds` rounds.

    Seeds of different rounds are 1000 apart, so that adjacent layers, whose seeds are their
    indices, share no hash.
    """
    hashes = [RandomHash(num_buckets, head_dim, seed + 1000 * r) for r in range(rounds)]
    return hashes[0] if rounds == 1 else HashRounds(hashes)


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
) -> Tensor:
    """Return sparse attention over keys selected by locality-sensitive hashing.

    Time and memory are linear in the number of tokens. Each query attends to the last
    `local_window` keys, the first `sinks` keys, and the `bucket_window` most recent keys of each of
    its `probes` most likely buckets. The result equals exact attention if the sequence fits into
    the local window, or with one bucket and a bucket window as long as the sequence.

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

    Returns:
        A tensor with the shape and dtype of `query`.

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
    hasher = random_hash(num_buckets, q.shape[-1], num_rounds, seed) if hash is None else hash
    for method in ("query_codes", "key_codes"):
        checks.function(f"hash.{method}", getattr(hasher, method, None))
    with torch.no_grad():
        query_codes = hasher.query_codes(q, min(probes, num_buckets))
        key_codes = hasher.key_codes(k)
    _check_codes(query_codes, key_codes, q, k, num_buckets)
    # A window longer than the text is no longer than the text; kernels count in int32.
    total = k.shape[2]
    limits: dict[str, Any] = {
        "bucket_window": min(whole("bucket_window", bucket_window, least=1), total),
        "local_window": min(whole("local_window", local_window, least=1), total),
        "sinks": min(whole("sinks", sinks, least=0), total),
    }
    if causal:
        out = kernel.lsh_attention(
            q,
            k,
            v,
            query_codes,
            key_codes,
            num_buckets=num_buckets,
            scale=scale,
            document_ids_BS=document_ids,
            key_mask_BS=key_mask,
            far_field=far_field,
            **limits,
        )
    else:
        limits |= {"rounds": key_codes.shape[1] // k.shape[1]}
        rows = [None if part is None else part.flip(-1) for part in (document_ids, key_mask)]
        past = candidate_mask(
            query_codes, key_codes, document_ids_BS=document_ids, key_mask_BS=key_mask, **limits
        )
        limits |= {"sinks": 0}
        future = candidate_mask(
            query_codes.flip(2),
            key_codes.flip(2),
            document_ids_BS=rows[0],
            key_mask_BS=rows[1],
            **limits,
        )
        out = masked_attention(q, k, v, past | future.flip(2, 3), scale)
    return out.reshape(query.shape)


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


MAX_BUCKETS = 1 << 16
MAX_ROUNDS = 64


class LshAttention(FullAttention):
    """LSH attention, with exact attention in the layers that `lsh_exact_layers` names.

    `hash` is a random hash until `plug_hashes` replaces it by a learned one.
    """

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        for name in ("num_buckets", "probes", "rounds", "bucket_window", "local_window", "sinks"):
            least = 0 if name == "sinks" else 1
            whole(f"lsh_{name}", getattr(config, f"lsh_{name}"), least=least, most=MAX_SIZE)
        flag("lsh_far_field", config.lsh_far_field)
        if config.lsh_far_field and config.positional_encoding in ("alibi", "dpe"):
            raise ConfigError(
                f"lsh_far_field=True contradicts positional_encoding={config.positional_encoding!r}"
                ", because a summary of keys has no bias; leave lsh_far_field out."
            )
        if config.sliding_window is not None:
            raise ConfigError(
                f"sliding_window={config.sliding_window} contradicts attention='lsh', whose window "
                "is lsh_local_window; leave sliding_window out."
            )

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        exact = (0, 1) if config.lsh_exact_layers is None else config.lsh_exact_layers
        self.exact = layer_idx in exact
        self.windows = Windows(
            config.lsh_local_window,
            config.lsh_sinks,
            config.lsh_bucket_window,
            config.lsh_num_buckets,
            config.lsh_rounds,
            config.lsh_far_field,
        )
        self.probes = min(config.lsh_probes, config.lsh_num_buckets)
        if not self.exact:
            self.hash = random_hash(
                config.lsh_num_buckets, self.head_dim, config.lsh_rounds, seed=layer_idx
            )

    def attend(
        self,
        query_BHTK: Tensor,
        key_BGSK: Tensor,
        value_BGSK: Tensor,
        plain: tuple[Tensor, Tensor],
        bias: ScoreBias | None,
        ctx: ForwardContext,
    ) -> Tensor:
        length = query_BHTK.shape[2]
        total = key_BGSK.shape[2]
        if self.exact or (ctx.cache is None and total <= self.windows.local):
            return super().attend(query_BHTK, key_BGSK, value_BGSK, plain, bias, ctx)
        with torch.no_grad():
            # Hash before positions are applied: rotated keys would be grouped by position instead
            # of content.
            buckets = layer_state(
                ctx.cache, self.layer_idx, BucketCache, self._no_buckets, "LSH attention needs"
            )
            first_BS = document_starts(ctx.document_ids_BT)
            buckets.append(self.hash.key_codes(plain[1]), ctx.token_mask_BT, first_BS)
            if total <= self.windows.local:
                return super().attend(query_BHTK, key_BGSK, value_BGSK, plain, bias, ctx)
            query_codes_BHTP = self.hash.query_codes(plain[0], self.probes)
        if length == 1:
            return buckets.attend(query_BHTK, key_BGSK, value_BGSK, query_codes_BHTP, bias=bias)
        return kernel.attend(
            query_BHTK, key_BGSK, value_BGSK, query_codes_BHTP, buckets, first_BS, bias=bias
        )

    def decode(
        self,
        inputs: AttentionInputs,
        biases: Sequence[ScoreBias | None],
        sequences: Sequence[ForwardContext],
    ) -> Tensor | None:
        if self.exact:
            return super().decode(inputs, biases, sequences)
        windows = self.windows
        layers = reserved_layers(inputs.key_BGTK, sequences, self.layer_idx)
        # Several rounds may find a key twice, and a far field needs sums; neither is in the kernel.
        if layers is None or windows.rounds > 1 or windows.far_field:
            return None
        from deepseek.kernels.decode_attention import Probes

        probes = Probes(
            self.hash.query_codes(inputs.plain_query_BHTK, self.probes)[0].transpose(0, 1),
            self.hash.key_codes(inputs.plain_key_BGTK)[0].transpose(0, 1),
            windows.num_buckets,
            windows.bucket,
            windows.local,
            windows.sinks,
        )
        addresses = [
            layer_state(
                sequence.cache, self.layer_idx, BucketCache, self._no_buckets, "LSH attention needs"
            ).addresses()
            for sequence in sequences
        ]
        parts = (inputs.query_BHTK, inputs.key_BGTK, inputs.value_BGTK)
        return decode(*parts, biases, layers, windows.local, probes, addresses)

    def state_bytes(self, length: int, itemsize: int) -> int:
        num_bytes = super().state_bytes(length, itemsize)
        if not self.exact:
            num_bytes += BucketCache.most_bytes(self.windows, self.groups, self.head_dim, length)
        return num_bytes

    def _no_buckets(self) -> BucketCache:
        return BucketCache(self.windows)
