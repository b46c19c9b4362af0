"""An upcycled layer computes what its dense network did, and all its parameters have gradients from
the first step on.
"""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from deepseek.model.config import ModelConfig
from deepseek.model.feed_forward import SwiGLU
from deepseek.model.moe.balance import update_routers
from deepseek.model.moe.experts import Experts
from deepseek.model.moe.layer import MoELayer, init_upcycled
from deepseek.model.quantised import with_large_quantised
from deepseek.model.transformer import DeepSeekModel

CASES = {
    "the issue's": {"num_experts": 16, "expert_dim": 32},
    "wider than the dense network": {"num_experts": 4, "expert_dim": 300, "max_experts": 4},
    "threshold on the edge": {"num_experts": 16, "expert_dim": 32, "routing_threshold": 0.5},
    "six candidates": {"num_experts": 6, "expert_dim": 32, "candidate_experts": 6},
    "raw top-k": {
        "num_experts": 8,
        "expert_dim": 32,
        "routing_strategy": "topk",
        "router_renormalize": False,
    },
    "sigmoid": {
        "num_experts": 8,
        "expert_dim": 32,
        "routing_strategy": "topk",
        "router_renormalize": False,
        "router_score": "sigmoid",
    },
}


def upcycled(pool=None, **changes):
    """Return an upcycled layer and the dense network that it came from."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=64, num_attention_heads=2, shared_expert_dim=192, **changes)
    layer = MoELayer(config, 0, pool)
    for parameter in layer.shared_experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    before = {name: p.detach().clone() for name, p in layer.shared_experts.named_parameters()}
    init_upcycled(layer, torch.Generator().manual_seed(1))
    return layer, lambda x: torch.func.functional_call(layer.shared_experts, before, (x,))


def run(layer, x):
    return layer(x, SimpleNamespace(token_mask_BT=None, router_stats=[], routing={}))


@pytest.mark.parametrize("case", CASES)
def test_output_is_unchanged_and_the_router_gets_a_gradient(case):
    layer, dense = upcycled(**CASES[case])
    x = torch.randn(4, 50, 64) * 2
    expected, y = dense(x), run(layer, x)
    assert (y - expected).abs().max() <= 1e-7 * expected.abs().max()
    (y * torch.randn_like(y)).sum().backward()
    experts = layer.pool
    assert layer.router.weight.grad.any() and experts.gate_up_proj.grad.any()
    # The experts' output grows at full speed, so the router has a gradient of normal size at the
    # next step.
    assert experts.down_proj.grad.abs().max() > 1e-2 * dense(x).std()


def test_shared_pool_keeps_every_layer_unchanged_and_learns_the_output_first():
    pool = Experts(16, 64, 32)
    layer, dense = upcycled(pool, num_experts=16, expert_dim=32)
    x = torch.randn(4, 50, 64)
    y = run(layer, x)
    torch.testing.assert_close(y, dense(x))
    y.square().sum().backward()
    assert pool.down_proj.grad.any()


def test_tokens_spread_over_the_experts_at_once():
    layer, _ = upcycled(num_experts=16, expert_dim=32)
    load = layer.router.route(torch.randn(500, 64)).load_E()
    assert load.min() > 0


def test_training_an_upcycled_layer_beats_training_its_dense_network():
    """The same steps on a target that needs more capacity than the dense network has."""
    layer, dense = upcycled(num_experts=16, expert_dim=64)
    control = SwiGLU(64, 192)
    untouched, _ = upcycled(num_experts=16, expert_dim=64)
    control.load_state_dict(untouched.shared_experts.state_dict())
    directions, maps = torch.randn(8, 64), torch.randn(8, 64, 64) / 4

    def train(module, forward):
        torch.manual_seed(1)
        optimiser = torch.optim.Adam(module.parameters(), lr=2e-3)
        losses = []
        for _ in range(150):
            x = torch.randn(256, 64)
            y = dense(x) + torch.einsum("nd,nde->ne", x, maps[(x @ directions.T).argmax(-1)])
            loss = (forward(x) - y).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            update_routers(module)
            losses.append(float(loss.detach()))
        return sum(losses[-10:])

    assert train(layer, lambda x: run(layer, x[None])[0]) < 0.95 * train(control, control)


@torch.no_grad()
def test_a_checkpoint_of_8_bits_is_upcycled_as_any_other(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    dense = DeepSeekModel(ModelConfig(**shape))
    dense.config.save_pretrained(tmp_path)
    tensors = dense.state_dict()
    del tensors["lm_head.weight"]
    save_file(with_large_quantised(tensors), tmp_path / "model.safetensors")
    changes = ModelConfig(num_experts=8, expert_dim=16)
    upcycled_model = DeepSeekModel.from_pretrained(tmp_path, config=changes, dtype="float32")
    quantised = DeepSeekModel.from_pretrained(tmp_path, dtype="float32")
    ids = torch.randint(0, 97, (2, 20))
    assert upcycled_model.config.num_experts == 8
    assert torch.equal(upcycled_model(ids).logits, quantised(ids).logits)
