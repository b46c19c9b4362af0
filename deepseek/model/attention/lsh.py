"""LSH attention: a query attends to a local window, attention sinks, and keys with similar hashes.

The kernels are in `deepseek.kernels.lsh`, and `sparse.py` offers them as a function. This file
connects them to the hash, the heads, packed documents, padding and the KV cache.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deepseek.checks import MAX_SIZE, flag, whole
from deepseek.errors import ConfigError
from deepseek.kernels.bias.score_bias import ScoreBias
from deepseek.kernels.lsh import attention as kernel
from deepseek.kernels.lsh.decode import BucketCache
from deepseek.kernels.lsh.intervals import Windows, document_starts
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
        return self.query_codes(key_BGSK, 1)[..., 0]

    def query_codes(self, query_BHTK: Tensor, probes: int) -> Tensor:
        return kernel.likeliest_buckets(query_BHTK, self.directions_CK.float().mT, None, probes)


def random_hash(num_buckets: int, head_dim: int, rounds: int, seed: int) -> Hash:
    """Return a `RandomHash` of `rounds` rounds.

    Seeds of different rounds are 1000 apart, so that adjacent layers, whose seeds are their
    indices, share no hash.
    """
    hashes = [RandomHash(num_buckets, head_dim, seed + 1000 * r) for r in range(rounds)]
    return hashes[0] if rounds == 1 else HashRounds(hashes)


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
        new = (inputs.key_BGTK, inputs.value_BGTK)
        layers = reserved_layers(*new, sequences, self.layer_idx)
        # The kernel supports neither duplicate keys of several rounds nor sums of a far field.
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
        return decode(inputs.query_BHTK, *new, biases, layers, windows.local, probes, addresses)

    def state_bytes(self, length: int, itemsize: int) -> int:
        num_bytes = super().state_bytes(length, itemsize)
        if not self.exact:
            num_bytes += BucketCache.most_bytes(self.windows, self.groups, self.head_dim, length)
        return num_bytes

    def _no_buckets(self) -> BucketCache:
        return BucketCache(self.windows)
