"""The layer as a whole: output, statistics, sharing and compilation."""

from dataclasses import dataclass, field

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from deepseek.kernels.moe.grouped_mm import mix_experts_reference
from deepseek.model.config import ModelConfig
from deepseek.model.moe.balance import update_routers
from deepseek.model.moe.experts import Experts
from deepseek.model.moe.layer import MoELayer
from deepseek.train.loop.optim import OptimConfig, adamw


def config(**changes):
    return ModelConfig(
        **{"hidden_size": 16, "num_attention_heads": 2, "num_experts": 8, "expert_dim": 12}
        | changes
    )


@dataclass
class Context:
    token_mask_BT: torch.Tensor | None = None
    router_stats: list = field(default_factory=list)
    routing: dict = field(default_factory=dict)


@pytest.mark.parametrize("strategy", ["dynamic", "topk", "dense"])
@pytest.mark.parametrize("shared", [0, 2])
def test_output_is_shared_plus_weighted_experts(strategy, shared):
    torch.manual_seed(0)
    layer = MoELayer(config(routing_strategy=strategy, num_shared_experts=shared), 0)
    x, ctx = torch.randn(2, 7, 16), Context()
    dispatch = layer.router.route(x)
    expected = mix_experts_reference(
        x.flatten(0, 1),
        layer.experts.gate_up_proj,
        layer.experts.down_proj,
        dispatch.slots_NA,
        dispatch.weights,
    ).view_as(x)
    if shared:
        expected = expected + layer.shared_experts(x)
    torch.testing.assert_close(layer(x, ctx), expected, atol=1e-5, rtol=0)
    assert (layer.shared_experts is None) == (shared == 0)


def test_no_tokens_and_single_tokens_are_fine():
    layer = MoELayer(config(num_shared_experts=1), 0)
    for shape in ((0, 3, 16), (2, 0, 16), (1, 1, 16)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x, Context())
        assert y.shape == shape and torch.isfinite(y).all()
        y.sum().backward()


def test_statistics_are_those_of_the_real_tokens():
    torch.manual_seed(0)
    layer = MoELayer(config(), 3)
    x, mask = torch.randn(1, 6, 16), torch.tensor([[True] * 4 + [False] * 2])
    masked, plain = Context(mask), Context()
    layer(x, masked)
    layer(x[:, :4], plain)
    (a,), (b,) = masked.router_stats, plain.router_stats
    assert a.layer_idx == 3
    for name in ("load", "mean_active", "dropped_mass", "entropy"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))
    dispatch = b.dispatch
    torch.testing.assert_close(b.load.sum(), torch.tensor(1.0))
    torch.testing.assert_close(b.mean_active, (dispatch.weights > 0).sum(-1).float().mean())
    torch.testing.assert_close(b.dropped_mass, 1 - dispatch.weights.sum(-1).mean().detach())
    p = dispatch.logits_NE.softmax(-1)
    torch.testing.assert_close(
        b.entropy, torch.distributions.Categorical(p).entropy().mean().detach()
    )


def test_layers_that_share_a_pool_hold_no_copy_of_it():
    pool = Experts(8, 16, 12)
    first, second = (MoELayer(config(), i, pool) for i in range(2))
    assert not [name for name, _ in first.named_parameters() if "expert" in name]
    x = torch.randn(1, 5, 16)
    first(x, Context()).sum().backward()
    once = pool.down_proj.grad.clone()
    second(x, Context()).sum().backward()
    assert (pool.down_proj.grad - once).any()


@pytest.mark.parametrize("strategy", ["dynamic", "topk"])
def test_compiled_layer_agrees_and_is_compiled_once_for_twenty_routings(strategy):
    torch.manual_seed(0)
    layer = MoELayer(config(routing_strategy=strategy, num_shared_experts=1), 0)
    counter = CompileCounter()
    compiled = torch.compile(lambda x: layer(x, Context()), backend=counter, fullgraph=True)
    for _ in range(20):
        x = torch.randn(2, 9, 16)
        layer.router.weight.data = torch.randn(8, 16)
        torch.testing.assert_close(compiled(x), layer(x, Context()), atol=1e-5, rtol=0)
        update_routers(layer)
    assert counter.frame_count == 1


def test_inductor_agrees_forward_and_backward():
    torch.manual_seed(0)
    layer = MoELayer(config(num_shared_experts=1), 0)
    x = torch.randn(2, 9, 16)
    compiled = torch.compile(lambda x: layer(x, Context()), fullgraph=True)
    grads = []
    for run in (lambda: layer(x, Context()), lambda: compiled(x)):
        layer.zero_grad()
        run().square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(compiled(x), layer(x, Context()), atol=1e-5, rtol=0)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", [0, 4])
def test_no_expert_is_dead_after_a_small_training(seed):
    """300 steps on a task with 4 regimes, trained as in the library, with few candidates so that
    balancing matters.
    """
    torch.manual_seed(seed)
    layer = MoELayer(config(num_experts=16, target_experts=3.0, candidate_experts=5), 0)
    centres, targets = torch.randn(4, 16) * 2, torch.randn(4, 16, 16) / 4
    optimiser = adamw(dict(layer.named_parameters()), OptimConfig(learning_rate=3e-3))

    def batch():
        regime = torch.randint(4, (256,))
        x = centres[regime] + torch.randn(256, 16)
        return x[None], torch.einsum("nd,nde->ne", x, targets[regime])[None]

    losses, active = [], []
    for _ in range(300):
        x, y = batch()
        ctx = Context()
        loss = (layer(x, ctx) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        update_routers(layer)
        losses.append(loss.item())
        active.append(ctx.router_stats[0].mean_active.item())
    loads = torch.zeros(16)
    for _ in range(10):
        ctx = Context()
        layer(batch()[0], ctx)
        loads += ctx.router_stats[0].load / 10
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert loads.min() > 0.1 / 16
    assert loads.max() < 1.4 / 16
    assert sum(active[-50:]) / 50 == pytest.approx(3.0, rel=0.05)
