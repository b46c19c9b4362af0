"""The bias balances the load, the temperature holds the mean number of experts, and neither counts
a token twice.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deepseek.model.config import ModelConfig
from deepseek.model.moe.balance import update_routers
from deepseek.model.moe.router import DynamicRouter, TopKRouter
from deepseek.model.transformer import DeepSeekModel


def routed(router, x):
    """Route x as a layer does in training, and return the dispatch."""
    dispatch = router.route(x)
    router.balance.record(dispatch, None)
    return dispatch


def test_bias_moves_against_the_load_and_stays_centred():
    router = TopKRouter(4, 2, top_k=1, balance_rate=0.5)
    dispatch = router.choose(
        torch.tensor([[9.0, 0, 0, 0], [9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 9.0, 0]])
    )
    router.balance.record(dispatch, None)
    router.balance.update()
    # loads 2, 1, 1, 0 around the mean of 1: steps -1, 0, 0, +1 times the rate
    assert router.balance.bias.tolist() == [-0.5, 0.0, 0.0, 0.5]
    assert not router.balance.counts.any()


def test_the_bias_moves_in_proportion_and_at_most_by_the_rate():
    router = TopKRouter(4, 2, top_k=1, balance_rate=0.5)
    router.balance.counts.copy_(torch.tensor([12, 2, 1, 1, 16]))
    router.balance.update()
    # The first has three times the mean load; its step is limited to the rate.
    steps = torch.tensor([-1.0, 0.5, 0.75, 0.75]) * 0.5
    assert torch.allclose(router.balance.bias, steps - steps.mean())


@pytest.mark.parametrize(
    "make", [lambda: DynamicRouter(16, 8, balance_rate=0.01), lambda: TopKRouter(16, 8, top_k=4)]
)
def test_load_evens_out(make):
    torch.manual_seed(0)
    router = make()
    router.weight.data = torch.randn(16, 8) * 0.3
    # A common direction in all tokens, so that all prefer the same experts.
    offset = torch.randn(8)

    def share():
        load = routed(router, torch.randn(512, 8) + offset).load_E().float()
        return load / load.sum() * 16

    before = share()
    for _ in range(400):
        share()
        update_routers(router)
    after = torch.stack([share() for _ in range(20)]).mean(0)
    assert before.min() < 0.15 and before.max() > 2
    assert after.min() > 0.3 and after.max() < 1.5


@pytest.mark.parametrize("target", [1.5, 3.0, 4.5])
@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
def test_temperature_holds_the_target_within_five_percent(target, spread):
    torch.manual_seed(0)
    router = DynamicRouter(16, 8, target_experts=target)
    router.weight.data = torch.randn(16, 8) * spread / 8**0.5
    for _ in range(300):
        routed(router, torch.randn(256, 8))
        update_routers(router)
    mean = torch.stack(
        [routed(router, torch.randn(256, 8)).active_N.float().mean() for _ in range(20)]
    ).mean()
    assert float(mean) == pytest.approx(target, rel=0.05)
    assert router.threshold == 0.7


def test_temperature_follows_a_router_that_changes():
    torch.manual_seed(0)
    router = DynamicRouter(16, 8, target_experts=2.5)
    start = torch.randn(16, 8)
    means = []
    for step in range(600):
        # Logits grow tenfold, as they do in training.
        router.weight.data = start * (0.1 + step / 600)
        means.append(routed(router, torch.randn(256, 8)).active_N.float().mean())
        update_routers(router)
    assert float(torch.stack(means[300:]).mean()) == pytest.approx(2.5, rel=0.05)


def test_evaluation_counts_nothing_and_padding_is_not_counted():
    router = DynamicRouter(8, 4)
    x, real = torch.randn(10, 4), torch.arange(10) < 6
    router.balance.record(router.route(x), real)
    assert router.balance.counts[-1] == 6
    router.eval()
    router.balance.record(router.route(x), None)
    assert router.balance.counts[-1] == 6


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_tokens_are_counted_once(use_reentrant):
    router = DynamicRouter(8, 4)
    x = torch.randn(10, 4, requires_grad=True)
    checkpoint(lambda x: routed(router, x).weights, x, use_reentrant=use_reentrant).sum().backward()
    assert router.weight.grad is not None
    assert router.balance.counts[-1] == 10


def test_update_without_a_pass_changes_nothing():
    router = DynamicRouter(8, 4, target_experts=2.0)
    update_routers(router)
    assert (
        not router.balance.bias.any()
        and router.balance.temperature == 1
        and router.balance.integral == 0
    )


def used_router() -> DynamicRouter:
    """Return a router whose balancing state needs more bits than bf16 has."""
    torch.manual_seed(0)
    router = DynamicRouter(8, 4, target_experts=2.0)
    for _ in range(3):
        routed(router, torch.randn(40, 4))
        update_routers(router)
    routed(router, torch.randn(40, 4))
    return router


@pytest.mark.parametrize(
    "cast",
    [
        lambda router: router.to(torch.bfloat16),
        lambda router: router.half(),
        lambda router: router.double(),
        lambda router: router.to("cpu", torch.bfloat16).float(),
        lambda router: router.share_memory(),
    ],
    ids=["bfloat16", "half", "double", "there and back", "shared"],
)
def test_steering_state_keeps_every_bit(cast):
    router = used_router()
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    assert any(not torch.equal(value, value.bfloat16().to(value)) for value in before.values())
    cast(router)
    after = dict(router.named_buffers())
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value), name


def test_steering_state_moves_to_the_meta_device_and_back():
    router = used_router().to("meta", torch.bfloat16)
    assert all(buffer.is_meta for buffer in router.buffers())
    router.to_empty(device="cpu")
    assert {buffer.dtype for buffer in router.buffers()} == {torch.float32, torch.int64}
    assert not any(buffer.is_meta for buffer in router.buffers())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_checkpoint_keeps_the_steering_state(stored, tmp_path):
    model = DeepSeekModel(
        ModelConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_experts=8,
            expert_dim=8,
        )
    ).to(stored)
    balance = model.layers[0].feed_forward.router.balance
    for buffer in (balance.bias, balance.temperature, balance.integral):
        buffer.copy_(torch.rand_like(buffer))
    model.save_pretrained(tmp_path)
    for dtype in ("bfloat16", "float32"):
        loaded = DeepSeekModel.from_pretrained(tmp_path, dtype=dtype)
        again = loaded.layers[0].feed_forward.router.balance.state_dict()
        for name, value in balance.state_dict().items():
            assert again[name].dtype == torch.float32 and torch.equal(again[name], value), name


def test_steering_state_is_saved_without_the_counts():
    assert set(DynamicRouter(8, 4).state_dict()) == {
        "weight",
        "balance.bias",
        "balance.temperature",
        "balance.integral",
    }
