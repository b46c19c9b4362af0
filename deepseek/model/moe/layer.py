"""The mixture-of-experts layer: route, dispatch, compute, combine; and how one grows beside a dense
network.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from deepseek.model.config import ModelConfig
from deepseek.model.feed_forward import SwiGLU
from deepseek.model.moe.experts import Experts
from deepseek.model.moe.router import build_router
from deepseek.model.moe.stats import Dispatch, RouterStats, RoutingDecision


class RoutingContext(Protocol):
    """The part of `ForwardContext` that this layer reads and fills."""

    token_mask_BT: Tensor | None
    router_stats: list[Any]
    routing: Mapping[int, RoutingDecision]


class MoELayer(nn.Module):
    """`y = shared(x) + sum over the chosen experts of w_i(x) E_i(x)`.

    Args:
        config: a `ModelConfig`.
        layer_idx: this layer's number, for the statistics.
        pool: experts shared with other layers and registered by the model; None gives the layer its
            own.
    """

    def __init__(self, config: ModelConfig, layer_idx: int, pool: Experts | None = None) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.router = build_router(config)
        self.experts = (
            Experts(config.num_experts, config.hidden_size, config.expert_dim)
            if pool is None
            else None
        )
        self._pool = (
            pool,
        )  # in a tuple, so that torch does not register the shared pool a second time
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.shared_expert_dim)
            if config.shared_expert_dim
            else None
        )

    @property
    def pool(self) -> Experts:
        """The routed experts, own or shared."""
        pool = self.experts if self.experts is not None else self._pool[0]
        assert pool is not None
        return pool

    def forward(self, x_BTD: Tensor, ctx: RoutingContext) -> Tensor:
        """Return the layer's output `[B, T, D]` and append its `RouterStats` to
        `ctx.router_stats`.
        """
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        dispatch = self.router.route(x_ND, ctx.routing.get(self.layer_idx))
        self._account(dispatch, ctx)
        y_ND = self.pool(x_ND, dispatch.slots_NA, dispatch.weights_NA)
        if self.shared_experts is not None:
            y_ND = y_ND + self.shared_experts(x_ND)
        return y_ND.view(x_BTD.shape)

    def _account(self, dispatch: Dispatch, ctx: RoutingContext) -> None:
        mask_N = None if ctx.token_mask_BT is None else ctx.token_mask_BT.flatten()
        self.router.balance.record(dispatch, mask_N)
        ctx.router_stats.append(RouterStats(self.layer_idx, dispatch, mask_N))


WHISPER = 1e-14
"""Scale of a new expert's output. It is lost in the rounding of the fp32 sum, so the model's logits
keep their bits, yet it is not zero, so the router has a gradient from the first step. Nothing
larger will do: at 1e-9 a few last bits of the residual stream flip, and 30 layers of SmolLM2
amplify them to 6e-5 in the logits (docs/log/moe.md, 2026-11-24)."""


@torch.no_grad()
def init_upcycled(layer: MoELayer, generator: Generator) -> None:
    """Initialise the routed experts of `layer`, whose `shared_experts` hold a dense network, so
    that it decides alone.

    Experts and router start random and so different from each other; only `down_proj` is scaled to
    a whisper. Its own gradient does not depend on that scale: the first optimiser step of usual
    size gives the experts a voice.
    """
    for weight, scale in (
        (layer.pool.gate_up_proj, 1.0),
        (layer.pool.down_proj, WHISPER),
        (layer.router.weight, 1.0),
    ):
        weight.copy_(_random(weight, generator) * scale)


def _random(weight: Tensor, generator: Generator) -> Tensor:
    """Return values that keep the variance of an input of unit variance."""
    return torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
