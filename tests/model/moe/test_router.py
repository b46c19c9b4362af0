"""Routing rules against references: ten lines of Python for the threshold rule, transformers'
routers for top-k.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from deepseek.errors import ConfigError
from deepseek.model.moe.router import DynamicRouter, TopKRouter
from deepseek.model.moe.stats import RoutingDecision

LOGITS = st.lists(st.integers(-40, 40), min_size=4, max_size=12, unique=True).map(
    lambda zs: [z / 7 for z in zs]
)


def oracle(
    z: list[float], b: list[float], threshold: float, low: int, high: int, temperature: float
) -> dict[int, float]:
    """The rule written out literally: weights of the experts kept for one token."""
    chosen = sorted(range(len(z)), key=lambda i: -(1 / (1 + math.exp(-z[i])) + b[i]))[:8]
    chosen.sort(key=lambda i: -z[i])
    total = sum(math.exp(z[i] / temperature) for i in chosen)
    kept, before = {}, 0.0
    for j, i in enumerate(chosen):
        q = math.exp(z[i] / temperature) / total
        if j < high and (j < low or before < threshold):
            kept[i] = q
        before += q
    return kept


@settings(max_examples=300, deadline=None)
@given(
    LOGITS,
    st.floats(0.05, 0.99),
    st.floats(0.2, 4),
    st.integers(1, 3),
    st.integers(0, 2),
    st.randoms(),
)
def test_dynamic_rule_matches_the_oracle(z, threshold, temperature, low, more, random):
    # Avoid round numbers, at which fp32 and fp64 sums may fall on different sides.
    threshold += 1e-7 * math.pi
    high = min(low + more, len(z))
    router = DynamicRouter(
        len(z), 2, threshold=threshold, min_experts=low, max_experts=high, temperature=temperature
    )
    router.balance.bias.copy_(torch.tensor([random.uniform(-0.2, 0.2) for _ in z]))
    dispatch = router.choose(torch.tensor([z]))
    expected = oracle(z, router.balance.bias.tolist(), threshold, low, high, temperature)
    active = int(dispatch.active_N[0])
    got = dict(
        zip(dispatch.ids[0, :active].tolist(), dispatch.weights[0, :active].tolist(), strict=True)
    )
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1.0), st.floats(0.01, 100), st.integers(1, 5))
def test_number_of_experts_stays_in_bounds_and_the_tail_is_zero(seed, threshold, scale, low):
    generator = torch.Generator().manual_seed(seed)
    router = DynamicRouter(16, 8, threshold=threshold, min_experts=low, max_experts=5)
    dispatch = router.choose(torch.randn(50, 16, generator=generator) * scale)
    assert dispatch.weights.shape == dispatch.ids.shape == (50, 5)
    assert ((dispatch.active_N >= low) & (dispatch.active_N <= 5)).all()
    assert not dispatch.weights[~dispatch.kept_NA].any()
    assert (dispatch.weights.diff(dim=-1) <= 0).all()
    assert (dispatch.slots_NA[~dispatch.kept_NA] == 16).all()
    assert all(len(set(row)) == 5 for row in dispatch.ids.tolist())


def test_public_contract():
    router = DynamicRouter(8, 4)
    x = torch.randn(2, 3, 4)
    weights = router(x)
    assert weights.shape == (2, 3, 8)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    dispatch = router.route(x)
    assert dispatch.ids.shape == dispatch.weights.shape == (6, 5)


@pytest.mark.parametrize("router", [DynamicRouter(8, 64), TopKRouter(8, 64, top_k=2)])
def test_logits_and_weights_are_in_fp32_under_autocast(router):
    x = torch.randn(20, 64)
    exact = router.logits(x), router(x), router.route(x).weights
    with torch.autocast("cpu", torch.bfloat16):
        mixed = router.logits(x), router(x), router.route(x).weights
    assert all(map(torch.equal, exact, mixed))


def test_router_learns_even_with_one_expert_a_token():
    router = DynamicRouter(8, 4, max_experts=1)
    router.route(torch.randn(10, 4)).weights.sum().backward()
    assert router.weight.grad is not None and router.weight.grad.any()


def test_bias_chooses_but_is_never_part_of_a_weight():
    router = TopKRouter(4, 4, top_k=2)
    router.balance.bias.copy_(torch.tensor([0.0, 0.0, 5.0, 5.0]))
    z = torch.tensor([[3.0, 2.0, 0.5, 0.1]])
    dispatch = router.choose(z)
    assert set(dispatch.ids[0].tolist()) == {2, 3}
    torch.testing.assert_close(dispatch.weights[0], z[0, dispatch.ids[0]].softmax(-1))


def filled(weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(weight.shape, generator=generator)


SMALL = {"hidden_size": 32, "num_experts_per_tok": 3}
THEIRS = {
    "mixtral": (MixtralTopKRouter, MixtralConfig(**SMALL, num_local_experts=12), {}),
    "qwen3": (Qwen3MoeTopKRouter, Qwen3MoeConfig(**SMALL, num_experts=12, norm_topk_prob=True), {}),
    "qwen3-raw": (
        Qwen3MoeTopKRouter,
        Qwen3MoeConfig(**SMALL, num_experts=12, norm_topk_prob=False),
        {"renormalize": False},
    ),
    "olmoe": (
        OlmoeTopKRouter,
        OlmoeConfig(**SMALL, num_experts=12, norm_topk_prob=False),
        {"renormalize": False},
    ),
    "deepseek-v3": (
        DeepseekV3TopkRouter,
        DeepseekV3Config(
            **SMALL, num_local_experts=12, n_group=4, topk_group=2, routed_scaling_factor=2.5
        ),
        {"score": "sigmoid", "groups": 4, "max_groups": 2, "scale": 2.5},
    ),
}


@pytest.mark.parametrize("family", THEIRS)
def test_top_k_matches_transformers(family):
    generator = torch.Generator().manual_seed(1)
    theirs_class, config, options = THEIRS[family]
    theirs = theirs_class(config)
    ours = TopKRouter(12, 32, top_k=3, **options)
    theirs.weight.data = ours.weight.data = filled(theirs.weight, generator)
    if family == "deepseek-v3":
        theirs.e_score_correction_bias.copy_(torch.randn(12, generator=generator) * 0.3)
        ours.balance.bias.copy_(theirs.e_score_correction_bias)
    x = torch.randn(40, 32, generator=generator)
    _, weights, ids = theirs(x)
    dispatch = ours.route(x)
    full_theirs = torch.zeros(40, 12).scatter(1, ids, weights)
    full_ours = torch.zeros(40, 12).scatter(1, dispatch.ids, dispatch.weights)
    torch.testing.assert_close(full_ours, full_theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: DynamicRouter(0, 4),
        lambda: DynamicRouter(8, 4, min_experts=6),
        lambda: DynamicRouter(8, 4, candidates=3),
        lambda: DynamicRouter(8, 4, threshold=0.0),
        lambda: TopKRouter(8, 4, top_k=9),
        lambda: TopKRouter(8, 4, top_k=1, groups=3),
        lambda: TopKRouter(8, 4, top_k=3, groups=4, max_groups=1),
        lambda: TopKRouter(8, 4, top_k=1, score="softmix"),
        lambda: DynamicRouter(8, 4).route(torch.randn(2, 5)),
    ],
)
def test_contradictory_arguments_are_one_clear_sentence(build):
    with pytest.raises(ConfigError, match=r"^.+\.$"):
        build()


@pytest.mark.parametrize(
    "router", [DynamicRouter(16, 4), TopKRouter(16, 4, top_k=3)], ids=["dynamic", "topk"]
)
def test_a_choice_is_kept_while_its_weights_follow_the_logits(router):
    x, other = torch.randn(2, 30, 4).unbind()
    first = router.route(x)
    with torch.no_grad():
        router.balance.bias.copy_(torch.linspace(-1, 1, 16))
    assert not torch.equal(router.route(x).slots_NA, first.slots_NA), (
        "the bias must change the routing here"
    )
    again = router.route(x, first.choice)
    assert torch.equal(again.slots_NA, first.slots_NA) and torch.equal(again.weights, first.weights)
    moved = router.route(other, first.choice)
    assert torch.equal(moved.slots_NA, first.slots_NA) and not torch.equal(
        moved.weights, first.weights
    )
    moved.weights.sum().backward()
    assert router.weight.grad is not None


@given(
    tokens=st.integers(0, 5),
    width=st.integers(1, 12),
    active=st.integers(-1, 9),
    others=st.integers(0, 6),
    dynamic=st.booleans(),
)
def test_a_choice_that_is_not_of_this_router_is_refused(tokens, width, active, others, dynamic):
    options = {"min_experts": 1, "max_experts": 5, "candidates": 8}
    router = DynamicRouter(12, 4, **options) if dynamic else TopKRouter(12, 4, top_k=3)
    x = torch.randn(3, 4)
    ids = torch.rand(tokens, 12).argsort(-1)[:, :width]
    choice = RoutingDecision(ids, torch.full((others,), active) if dynamic else None)
    fits = tokens == 3 and width == (8 if dynamic else 3)
    if fits and (not dynamic or (others == 3 and 1 <= active <= 5)):
        dispatch = router.route(x, choice)
        assert dispatch.kept_NA.sum(-1).tolist() == [active if dynamic else 3] * 3
    else:
        with pytest.raises(ConfigError, match=r"^choice\..+\.$"):
            router.route(x, choice)


def test_a_dynamic_router_needs_the_number_of_active_experts():
    router = DynamicRouter(12, 4)
    choice = router.route(torch.randn(3, 4)).choice
    with pytest.raises(ConfigError, match=r"choice\.active_N"):
        router.route(torch.randn(3, 4), RoutingDecision(choice.ids_NC, None))
