"""Dynamic positional encoding: a learned, context-dependent, relative bias of attention scores.

    s[i, j] = tau_i * q_i . R(i - j) k_j / sqrt(K) + t_i[bucket(i - j)] + kappa_j
    t_i     = A + sum_m tanh(W_g x_i)_m U_m
    kappa_j = sum of gamma * slope * softplus(W_f x_l) over l <= j
    tau_i   = 1 + s * log(max(1, (i + 1) / n))

t is a learned table over distances, shifted by context. kappa is a learned forget gate
(arXiv:2503.02130). tau sharpens scores far into a document.

A, U, gamma and s exist per head and start at zero, so that the model starts with rotary positions
only. W_g and W_f start at random values, so that all four have a gradient from the first step. The
slopes are those of ALiBi: heads forget at different rates, and one step of gamma cannot move a
score by hundreds. A negative gamma would make a head prefer the beginning more and more as the text
grows, so it is scaled by 0.01. n is an eighth of the training length, so that s is trained on
positions beyond n.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, softplus

from deepseek.kernels.bias.distance import NUM_BUCKETS, distance_buckets
from deepseek.kernels.bias.score_bias import ScoreBias
from deepseek.model.config import ModelConfig
from deepseek.model.kv_cache import TokenState, layer_state
from deepseek.model.positions.alibi import slopes
from deepseek.model.positions.protocol import ScoreBiasSource

if TYPE_CHECKING:
    from deepseek.model.context import ForwardContext

CONTEXTS = 8
"""Number of context directions (m above) that shift the tables of a layer."""

PACE = 64
"""Factor on A, U and gamma. Without it, a bias of a few nats would take thousands of steps at a
learning rate that suits weights.
"""


class KeyBiasState(TokenState):
    """kappa `[B, H, S]` of the cached keys of one layer, in fp64."""


class DynamicBias(ScoreBiasSource):
    """The parameters of one layer: biases by distance, context, forget gate, length scale."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads = config.num_attention_heads
        width = config.hidden_size
        self.initializer_range = config.initializer_range
        self.train_len = config.train_len or config.max_position_embeddings
        self.distance_HN = nn.Parameter(torch.empty(heads, NUM_BUCKETS))
        self.context_HMN = nn.Parameter(torch.empty(heads, CONTEXTS, NUM_BUCKETS))
        self.gate = nn.Linear(width, CONTEXTS)
        self.forget = nn.Linear(width, heads)
        self.decay_H = nn.Parameter(torch.empty(heads))
        self.length_scale_H = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset to initial values, at which the bias is zero."""
        for parameter in (self.distance_HN, self.context_HMN, self.decay_H, self.length_scale_H):
            nn.init.zeros_(parameter)
        for linear in (self.gate, self.forget):
            nn.init.normal_(linear.weight, std=self.initializer_range)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BTD: Tensor, ctx: "ForwardContext", layer_idx: int) -> ScoreBias | None:
        if not self._learns() and self._is_zero():
            return None
        return ScoreBias(
            self._table(x_BTD),
            self._key_bias(self._rates(x_BTD, ctx), ctx, layer_idx),
            self._scale(ctx.position_ids_BT),
        )

    def each(self, x_1ND: Tensor, ctx: "ForwardContext", layer_idx: int) -> list[ScoreBias | None]:
        if not self._learns() and self._is_zero():
            return [None] * len(ctx.sequences)
        parts = zip(
            self._table(x_1ND).split(ctx.lengths, dim=2),
            self._rates(x_1ND, ctx).split(ctx.lengths, dim=1),
            self._scale(ctx.position_ids_BT).split(ctx.lengths, dim=2),
            ctx.sequences,
            strict=True,
        )
        return [
            ScoreBias(table, self._key_bias(rates, sequence, layer_idx), scale)
            for table, rates, scale, sequence in parts
        ]

    def state_bytes(self, length: int) -> int:
        return 8 * len(self.decay_H) * length

    def _learns(self) -> bool:
        return torch.is_grad_enabled() and any(
            parameter.requires_grad for parameter in self.parameters()
        )

    def _is_zero(self) -> bool:
        starts = (self.distance_HN, self.context_HMN, self.decay_H, self.length_scale_H)
        return not any(bool(parameter.any()) for parameter in starts)

    def tables(self) -> Tensor:
        """Return A, the bias by distance, then U, its shifts by context: `[H, M + 1, 32]`.

        Distances of half the training length or more share one value, because each of them is rare
        in training or never occurs.
        """
        buckets_N = torch.arange(NUM_BUCKETS, device=self.distance_HN.device)
        buckets_N = buckets_N.clamp(max=int(distance_buckets(torch.tensor(self.train_len // 2))))
        parts = torch.cat((self.distance_HN[:, None], self.context_HMN), dim=1)
        return PACE * parts.float()[..., buckets_N]

    def decay(self) -> Tensor:
        """Return the factor `[H]` on the forget gates, gamma times slope."""
        slopes_H = torch.tensor(slopes(len(self.decay_H)), device=self.decay_H.device)
        return leaky_relu(PACE * self.decay_H.float()) * slopes_H

    def growth(self, position_ids: Tensor) -> Tensor:
        """Return the logarithm log(max(1, (i + 1) / n)) of each position i."""
        return (8 * (position_ids + 1) / self.train_len).clamp(min=1).log()

    def _table(self, x_BTD: Tensor) -> Tensor:
        """Return t `[B, H, T, 32]`."""
        contexts_B1TM = self.gate(x_BTD).float().tanh()[:, None]
        tables = self.tables()
        return contexts_B1TM @ tables[:, 1:] + tables[:, :1]

    def _rates(self, x_BTD: Tensor, ctx: "ForwardContext") -> Tensor:
        """Return what each token adds to kappa, fp64 `[B, T, H]`; padding adds nothing."""
        rates_BTH = softplus(self.forget(x_BTD).float()) * self.decay()
        if ctx.token_mask_BT is not None:
            rates_BTH = rates_BTH * ctx.token_mask_BT[..., None]
        return rates_BTH.double()

    def _key_bias(self, rates_BTH: Tensor, ctx: "ForwardContext", layer_idx: int) -> Tensor:
        """Return kappa `[B, H, S]`, with past tokens from the cache."""
        sums_BHT = rates_BTH.cumsum(1).transpose(1, 2)
        if ctx.cache is None:
            return sums_BHT
        state = layer_state(
            ctx.cache, layer_idx, KeyBiasState, KeyBiasState, "Dynamic positions need"
        )
        stored = 0 if state.values is None else state.values.shape[-1]
        if stored < ctx.past:
            # Passes without gradients store nothing while the bias, and thus kappa, is zero.
            state.append(sums_BHT.new_zeros(*sums_BHT.shape[:2], ctx.past - stored))
        return state.append(sums_BHT if state.values is None else state.values[..., -1:] + sums_BHT)

    def _scale(self, position_ids_BT: Tensor) -> Tensor:
        """Return tau `[B, H, T]`."""
        growth_B1T = self.growth(position_ids_BT)[:, None]
        return 1 + self.length_scale_H.float()[:, None] * growth_B1T
