"""Growing routed experts out of a dense feed-forward network without changing what it computes."""

import torch
from torch import Generator, Tensor

from deepseek.model.feed_forward import SwiGLU
from deepseek.model.moe.layer import MoELayer
from deepseek.model.moe.router import DynamicRouter, Router

# Router logits of this size order the experts at random, yet leave their weights equal to within fp32 rounding.
ROUTER_NOISE = 2e-6


@torch.no_grad()
def init_upcycled(layer: MoELayer, generator: Generator) -> None:
    """Initialise the routed experts of `layer`, whose `shared_experts` hold a dense FFN, without changing its output.

    Every expert starts as a copy of the same random slice of the dense FFN's neurons, and fresh neurons with zero
    output in the rest of its width. With equal logits a token's weights sum to the same W whichever experts it takes,
    so the routed part is W times the slice, and the slice's share of the dense FFN is scaled by 1 - W. Experts with
    zero output would keep the logits just as well, but d y/d w_i = E_i(x) would leave the router without gradient.
    Experts that several layers share cannot be a slice of each layer's FFN: they start at zero output, and the
    router gets its gradient from the second step on. So it does with renormalised weights, whose sum never changes.
    """
    dense, pool = layer.shared_experts, layer.pool
    assert dense is not None, "an upcycled layer has the dense FFN as its shared expert"
    _fresh(pool.gate_up_proj, generator)
    pool.down_proj.zero_()
    layer.router.weight.copy_(_noise(layer.router, generator))
    if layer.experts is not None:
        _move_slice(layer, dense, generator)


def _move_slice(layer: MoELayer, dense: SwiGLU, generator: Generator) -> None:
    """Hand the share W of a random slice of the dense FFN's neurons to every routed expert."""
    pool, width = layer.pool, layer.pool.down_proj.shape[-1]
    total = layer.router.choose(torch.zeros(1, layer.router.num_experts)).weights.sum()
    neurons = torch.randperm(dense.up_proj.out_features, generator=generator)[: max(width // 2, 1)]
    count = len(neurons)
    pool.gate_up_proj[:, :count] = dense.gate_proj.weight[neurons]
    pool.gate_up_proj[:, width : width + count] = dense.up_proj.weight[neurons]
    pool.down_proj[:, :, :count] = dense.down_proj.weight[:, neurons]
    dense.down_proj.weight[:, neurons] *= 1 - total


def _fresh(weight: Tensor, generator: Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)


def _noise(router: Router, generator: Generator) -> Tensor:
    """Return router rows that choose at random; zeros where they could tip the threshold rule at equal weights."""
    noise = torch.randn(router.weight.shape, generator=generator) * ROUTER_NOISE * router.input_dim**-0.5
    equal = router.threshold * router.candidates if isinstance(router, DynamicRouter) else 0.5
    return noise * (abs(equal - round(equal)) > 1e-3)
