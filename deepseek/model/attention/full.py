"""Exact attention over all visible keys."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from deepseek.kernels.bias.score_bias import ScoreBias, biased_attention
from deepseek.model.attention.capped import capped_attention
from deepseek.model.attention.decode import decode, reserved_layers
from deepseek.model.config import ModelConfig
from deepseek.model.context import ForwardContext
from deepseek.model.norm import RMSNorm
from deepseek.model.positions import POSITIONS


@dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys and values of the new tokens at one layer.

    Attributes:
        plain_query_BHTK, plain_key_BGTK: before positions are applied; LSH hashes read these.
        query_BHTK, key_BGTK: after positions are applied.
        value_BGTK: values.
    """

    plain_query_BHTK: Tensor
    plain_key_BGTK: Tensor
    query_BHTK: Tensor
    key_BGTK: Tensor
    value_BGTK: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the attributes."""
        return (
            self.plain_query_BHTK,
            self.plain_key_BGTK,
            self.query_BHTK,
            self.key_BGTK,
            self.value_BGTK,
        )

    def split(self, lengths: list[int]) -> "list[AttentionInputs]":
        """Return the inputs of consecutive ranges of tokens.

        Args:
            lengths: number of tokens in each range.
        """
        ranges = zip(*(part.split(lengths, dim=2) for part in self.parts), strict=True)
        return [AttentionInputs(*tensors) for tensors in ranges]

    @staticmethod
    def join(inputs: "Sequence[AttentionInputs]") -> "AttentionInputs":
        """Return the inputs of several ranges of tokens as those of one."""
        ranges = zip(*(one.parts for one in inputs), strict=True)
        return AttentionInputs(*(torch.cat(tensors, dim=2) for tensors in ranges))


class FullAttention(nn.Module):
    """Causal multi-head attention with grouped key/value heads (arXiv:2305.13245).

    Other kinds derive from this class. They override `attend`, and `check` and `state_bytes` if
    they have config fields or cache state of their own. They get that state from `layer_state`.
    """

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raise `ConfigError` if the fields of this kind of attention contradict the config."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.groups = config.num_key_value_heads
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        self.clip_qkv = config.clip_qkv
        self.score_cap = config.attn_logit_softcapping
        self.norm_heads = config.qk_norm == "head"
        self.windowed = config.sliding_window is not None and layer_idx not in (
            config.full_attention_layers or ()
        )
        width = config.hidden_size
        bias = config.attention_bias
        query_width = config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, key_width, bias=bias)
        self.v_proj = nn.Linear(width, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=config.attention_output_bias)
        if config.qk_norm != "none":
            rules = (config.rms_norm_eps, config.unit_offset_norms)
            self.q_norm = RMSNorm(self.head_dim if self.norm_heads else query_width, *rules)
            self.k_norm = RMSNorm(self.head_dim if self.norm_heads else key_width, *rules)
        self.normed = config.qk_norm != "none"
        # Scores are divided by sqrt(K) wherever they are computed; this makes up for another scale.
        self.query_factor = math.sqrt(
            self.head_dim / (config.query_pre_attn_scalar or self.head_dim)
        )
        source = POSITIONS[config.positional_encoding].score_bias
        self.score_bias = None if source is None else source(config)

    def forward(self, x_BTD: Tensor, ctx: ForwardContext) -> Tensor:
        inputs = self.inputs(x_BTD, ctx)
        if ctx.sequences:
            attended_BHTK = self._attend_sequences(inputs, x_BTD, ctx)
        else:
            bias = None if self.score_bias is None else self.score_bias(x_BTD, ctx, self.layer_idx)
            attended_BHTK = self._attend_cached(inputs, bias, ctx)
        output: Tensor = self.o_proj(attended_BHTK.transpose(1, 2).flatten(2))
        return output

    def _attend_cached(
        self, inputs: AttentionInputs, bias: ScoreBias | None, ctx: ForwardContext
    ) -> Tensor:
        """Append the new keys and values to the cache and return the attended values."""
        key = inputs.key_BGTK
        value = inputs.value_BGTK
        if ctx.cache is not None:
            key, value = ctx.cache.update(key, value, self.layer_idx)
        plain = (inputs.plain_query_BHTK, inputs.plain_key_BGTK)
        return self.attend(inputs.query_BHTK, key, value, plain, bias, ctx)

    def _attend_sequences(
        self, inputs: AttentionInputs, x_1ND: Tensor, ctx: ForwardContext
    ) -> Tensor:
        """Return the attended values `[1, H, N, K]` of sequences that lie end to end in one row.

        Sequences with one new token are decoded together if a kernel supports it.
        """
        sequences = ctx.sequences
        biases: list[ScoreBias | None] = (
            [None] * len(sequences)
            if self.score_bias is None
            else self.score_bias.each(x_1ND, ctx, self.layer_idx)
        )
        decoding = [
            i for i, one in enumerate(sequences) if self.decodes and one.length == 1 and one.past
        ]
        if len(decoding) == len(sequences):
            decoded = self.decode(inputs, biases, sequences)
            if decoded is not None:
                return decoded
        parts = inputs.split(ctx.lengths)
        attended: dict[int, Tensor] = {}
        if 0 < len(decoding) < len(sequences):
            decoded = self.decode(
                AttentionInputs.join([parts[i] for i in decoding]),
                [biases[i] for i in decoding],
                [sequences[i] for i in decoding],
            )
            if decoded is not None:
                attended = dict(zip(decoding, decoded.split(1, dim=2), strict=True))
        for i, part in enumerate(parts):
            if i not in attended:
                attended[i] = self._attend_cached(part, biases[i], sequences[i])
        return torch.cat([attended[i] for i in range(len(parts))], dim=2)

    @cached_property
    def decodes(self) -> bool:
        """Whether `decode` computes the same as `attend`: both come from the same class."""
        owners = [
            next(kind for kind in type(self).__mro__ if name in vars(kind))
            for name in ("attend", "decode")
        ]
        return owners[0] is owners[1]

    def decode(
        self,
        inputs: AttentionInputs,
        biases: Sequence[ScoreBias | None],
        sequences: Sequence[ForwardContext],
    ) -> Tensor | None:
        """Append one token to each of R sequences and return the attended values `[1, H, R, K]`;
        None, with nothing appended, if this device has no kernel for it.

        A kind that overrides `attend` may override this as well; otherwise its sequences are
        computed one after another.

        Args:
            inputs: queries, keys and values of the new tokens, in one row.
            biases: bias of each sequence's scores.
            sequences: context of each sequence.
        """
        new = (inputs.key_BGTK, inputs.value_BGTK)
        layers = reserved_layers(*new, sequences, self.layer_idx)
        if layers is None or self.score_cap is not None:
            return None
        window = sequences[0].window if self.windowed else None
        return decode(inputs.query_BHTK, *new, biases, layers, window)

    def state_bytes(self, length: int, itemsize: int) -> int:
        """Return an upper bound on this layer's bytes in the cache for one sequence.

        Args:
            length: tokens of the sequence.
            itemsize: bytes per number in keys and values.
        """
        positions = 0 if self.score_bias is None else self.score_bias.state_bytes(length)
        return 2 * self.groups * self.head_dim * itemsize * length + positions

    def attend(
        self,
        query_BHTK: Tensor,
        key_BGSK: Tensor,
        value_BGSK: Tensor,
        plain: tuple[Tensor, Tensor],
        bias: ScoreBias | None,
        ctx: ForwardContext,
    ) -> Tensor:
        """Return the attention-weighted values `[B, H, T, K]`.

        Args:
            query_BHTK: queries of the new tokens.
            key_BGSK, value_BGSK: keys and values of past tokens, then of new ones.
            plain: queries and keys of the new tokens before positions are applied, for hashing;
                exact attention does not read them.
            bias: bias of the scores; None: no bias.
            ctx: context of the forward pass.
        """
        if bias is not None:
            visible = ctx.window_visible if self.windowed else ctx.visible
            return biased_attention(query_BHTK, key_BGSK, value_BGSK, bias, visible)
        mask = ctx.window_mask_B1TS if self.windowed else ctx.mask_B1TS
        if self.score_cap is not None:
            return capped_attention(query_BHTK, key_BGSK, value_BGSK, self.score_cap, mask)
        causal = mask is None and query_BHTK.shape[2] > 1
        return scaled_dot_product_attention(
            query_BHTK,
            key_BGSK,
            value_BGSK,
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=self.grouped,
        )

    def inputs(self, x_BTD: Tensor, ctx: ForwardContext) -> AttentionInputs:
        """Return queries, keys and values for normed hidden states `[B, T, D]`."""
        query = self.q_proj(x_BTD)
        key = self.k_proj(x_BTD)
        value = self.v_proj(x_BTD)
        if self.normed and not self.norm_heads:
            query = self.q_norm(query)
            key = self.k_norm(key)
        if self.clip_qkv is not None:
            query, key, value = (
                part.clamp(-self.clip_qkv, self.clip_qkv) for part in (query, key, value)
            )
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value)
        )
        if self.norm_heads:
            query = self.q_norm(query)
            key = self.k_norm(key)
        if self.query_factor != 1:
            query = query * self.query_factor
        return AttentionInputs(query, key, *ctx.positions(query, key, self.windowed), value)
