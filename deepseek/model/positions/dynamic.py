"""Dynamic positional encoding, relative and aware of context: a bias of attention scores that a layer learns.

    s[i, j] = tau_i * q_i . R(i - j) k_j / sqrt(K) + t_i[bucket(i - j)] + kappa_j
    t_i     = A + sum_m tanh(W_g x_i)_m U_m                  a learned table over distances, shifted by context
    kappa_j = sum of gamma * slope * softplus(W_f x_l), l <= j   a learned forget gate (arXiv:2503.02130)
    tau_i   = 1 + s * log(max(1, (i + 1) / n))                   sharper scores far into a document

A, U, gamma and s (each for every head) start at zero, so that the model starts as one with rotary positions alone;
W_g and W_f do not, so that each of the four has a gradient from the first step. The slopes are ALiBi's: heads forget
at different speeds, and a step of gamma moves no score by hundreds. A gamma below zero, which would make a head prefer
the beginning ever more as the text grows, counts a hundredth. n is an eighth of the training length, so that s has
something to learn from within it.
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

if TYPE_CHECKING:
    from deepseek.model.context import ForwardContext

CONTEXTS = 8
"""Directions of context (m above) that shift a layer's tables."""

PACE = 64
"""Factor of A, U and gamma. At a learning rate fit for weights, a bias of some nats would take thousands of steps."""


class KeyBiasState(TokenState):
    """kappa `[B, H, S]` of the keys of one layer in the cache, in fp64."""


class DynamicBias(nn.Module):
    """The parameters of one layer: a table of biases by distance, its context, forget gate and length scale."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, width = config.num_attention_heads, config.hidden_size
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
        """Start at zero bias."""
        for parameter in (self.distance_HN, self.context_HMN, self.decay_H, self.length_scale_H):
            nn.init.zeros_(parameter)
        for linear in (self.gate, self.forget):
            nn.init.normal_(linear.weight, std=self.initializer_range)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BTD: Tensor, ctx: "ForwardContext", layer_idx: int) -> ScoreBias | None:
        if not self._learns() and self._is_zero():
            return None
        return ScoreBias(self._table(x_BTD), self._key_bias(x_BTD, ctx, layer_idx), self._scale(ctx.position_ids_BT))

    def state_bytes(self, length: int) -> int:
        return 8 * len(self.decay_H) * length

    def _learns(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def _is_zero(self) -> bool:
        starts = (self.distance_HN, self.context_HMN, self.decay_H, self.length_scale_H)
        return not any(bool(parameter.any()) for parameter in starts)

    def _table(self, x_BTD: Tensor) -> Tensor:
        """Return t `[B, H, T, 32]`.

        Distances from half the training length on share a value: each is too rare in training, or never seen there.
        """
        seen_N = torch.arange(NUM_BUCKETS, device=x_BTD.device)
        seen_N = seen_N.clamp(max=int(distance_buckets(torch.tensor(self.train_len // 2))))
        contexts_B1TM = self.gate(x_BTD).float().tanh()[:, None]
        tables_BHTN = contexts_B1TM @ self.context_HMN.float()[..., seen_N] + self.distance_HN.float()[:, None, seen_N]
        return PACE * tables_BHTN

    def _key_bias(self, x_BTD: Tensor, ctx: "ForwardContext", layer_idx: int) -> Tensor:
        """Return kappa `[B, H, S]`, past tokens' from the cache; padding forgets nothing."""
        slopes_H = torch.tensor(slopes(len(self.decay_H)), device=x_BTD.device)
        rates_BTH = softplus(self.forget(x_BTD).float()) * leaky_relu(PACE * self.decay_H.float()) * slopes_H
        if ctx.token_mask_BT is not None:
            rates_BTH = rates_BTH * ctx.token_mask_BT[..., None]
        sums_BHT = rates_BTH.double().cumsum(1).transpose(1, 2)
        if ctx.cache is None:
            return sums_BHT
        state = layer_state(ctx.cache, layer_idx, KeyBiasState, KeyBiasState, "Dynamic positions need")
        return state.append(sums_BHT if state.values is None else state.values[..., -1:] + sums_BHT)

    def _scale(self, position_ids_BT: Tensor) -> Tensor:
        """Return tau `[B, H, T]`."""
        growth_BT = (8 * (position_ids_BT + 1) / self.train_len).clamp(min=1).log()
        return 1 + self.length_scale_H.float()[:, None] * growth_BT[:, None]
