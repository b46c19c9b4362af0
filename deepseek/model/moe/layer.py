"""The mixture-of-experts layer (route, dispatch, compute, combine) and its upcycling."""

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
    """The part of `ForwardContext` that this layer reads and writes."""

    token_mask_BT: Tensor | None
    router_stats: list[Any]
    routing: Mapping[int, RoutingDecision]


class MoELayer(nn.Module):
    """`y = shared(x) + sum over the chosen experts of w_i(x) E_i(x)`.

    Args:
        config: a `ModelConfig`.
        layer_idx: index of this layer, for the statistics.
        pool: experts that are shared with other layers and registered by the model; None: the layer
            owns its experts.
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
        # In a tuple, so that torch does not register the shared pool a second time.
        self._pool = (pool,)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.shared_expert_dim)
            if config.shared_expert_dim
            else None
        )

    @property
    def pool(self) -> Experts:
        """The routed experts, owned or shared."""
        pool = self.experts if self.experts is not None else self._pool[0]
        assert pool is not None
        return pool

    def forward(self, x_BTD: Tensor, ctx: RoutingContext) -> Tensor:
        """Return the layer's output `[B, T, D]`.

        Routing decisions in `ctx.routing` are replayed. The layer's `RouterStats` are appended to
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
"""Scale of a new expert's output. It is small enough to vanish when it is added in fp32, so the
logits stay bit-identical, but it is not zero, so the router has a gradient from the first step. A
larger scale does not work: at 1e-9 some last bits of the residual stream flip, and the 30 layers of
SmolLM2 amplify them to 6e-5 in the logits (docs/log/moe.md, 2026-11-24).
"""


@torch.no_grad()
def init_upcycled(layer: MoELayer, generator: Generator) -> None:
    """Initialise the routed experts of a layer so that its output does not change.

    The layer's `shared_experts` hold the dense network that is upcycled. Experts and router are
    random, which breaks their symmetry, and `down_proj` is scaled by `WHISPER`. The gradient of
    `down_proj` does not depend on that scale, so the first optimiser step of normal size gives the
    experts an effect.

    Args:
        layer: the layer to initialise.
        generator: source of the random weights.
    """
    for weight, scale in (
        (layer.pool.gate_up_proj, 1.0),
        (layer.pool.down_proj, WHISPER),
        (layer.router.weight, 1.0),
    ):
        weight.copy_(_random(weight, generator) * scale)


def _random(weight: Tensor, generator: Generator) -> Tensor:
    """Return normal values that map an input of unit variance to an output of unit variance."""
    return torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
