"""Gate scores, their running mean, and arbitration when several gates fire."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.model.context import ForwardContext
from deepseek.model.experts.armed import combine
from deepseek.model.experts.gate import (
    NATS,
    RIDGE,
    SHARPNESS,
    GateBank,
    arbitrate,
    contrasts,
    running_mean,
)
from deepseek.packs.manifest import MOMENTS

seeds = st.integers(0, 10_000)


def mean_by_hand(scores_TRM, decay_M, real_T, documents_T):
    """Compute the running mean of one row recursively, in double precision."""
    total, count, means = 0.0, 0.0, []
    for t in range(len(scores_TRM)):
        if t and documents_T[t] != documents_T[t - 1]:
            total, count = 0.0 * total, 0.0 * count
        if real_T[t]:
            total, count = total * decay_M + scores_TRM[t], count * decay_M + 1.0
        means.append(
            total / count
            if real_T[: t + 1].any() and real_T[t]
            else torch.zeros_like(scores_TRM[t])
        )
    return torch.stack(means)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    length=st.integers(1, 70),
    cut=st.integers(0, 70),
    padded=st.booleans(),
    packed=st.booleans(),
)
def test_running_mean_equals_the_recursion_however_it_is_cut(seed, length, cut, padded, packed):
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, length, 2, 3, generator=random)
    decay = 0.5 ** (1 / torch.tensor([1.0, 8.0, 500.0]))
    real = torch.rand(2, length, generator=random) > 0.3 if padded else None
    documents = (torch.rand(2, length, generator=random) > 0.8).cumsum(1) if packed else None
    got, state = running_mean(scores, decay, None, real, documents)
    for row in range(2):
        real_T = real[row] if padded else torch.ones(length, dtype=torch.bool)
        documents_T = documents[row] if packed else torch.zeros(length)
        want = mean_by_hand(scores[row].double(), decay.double(), real_T, documents_T)
        torch.testing.assert_close(got[row][real_T].double(), want[real_T], atol=1e-5, rtol=1e-5)
    if not packed:
        cut = min(cut, length - 1)
        masks = (None, None) if real is None else (real[:, :cut], real[:, cut:])
        first, middle = (
            running_mean(scores[:, :cut], decay, None, masks[0]) if cut else (scores[:, :0], None)
        )
        second, end = running_mean(scores[:, cut:], decay, middle, masks[1])
        torch.testing.assert_close(torch.cat([first, second], 1), got, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(end, state, atol=1e-4, rtol=1e-5)


def test_half_life_is_what_it_says():
    bank = GateBank.stack(
        [torch.zeros(5)], [torch.zeros(MOMENTS, 4)], [16.0], 5, torch.device("cpu")
    )
    scores = torch.zeros(1, 4000, 1, 1)
    scores[:, :3000] = 1.0
    mean, _ = running_mean(scores, bank.decay)
    torch.testing.assert_close(mean[0, 3000 + 16 - 1, 0, 0], torch.tensor(0.5), atol=1e-4, rtol=0)


@settings(max_examples=100, deadline=None)
@given(seed=seeds, modules=st.integers(1, 9), most=st.integers(1, 9))
def test_arbitration_properties(seed, modules, most):
    random = torch.Generator().manual_seed(seed)
    detect = torch.randn(2, 6, modules, generator=random)
    contrast = 5 * torch.randn(2, 6, modules, generator=random)
    weights = arbitrate(detect, contrast, most)
    assert weights.isfinite().all() and weights.ge(0).all() and weights.sum(-1).le(1 + 1e-6).all()
    assert weights[detect <= 0].eq(0).all()
    assert (weights > 0).sum(-1).le(most).all()
    assert weights.sum(-1)[(detect > 0).any(-1)].ge(0.5 - 1e-6).all()
    order = torch.randperm(modules, generator=random)
    torch.testing.assert_close(
        arbitrate(detect[..., order], contrast[..., order], most), weights[..., order]
    )
    shifted = arbitrate(detect, contrast + 3.0, most)
    torch.testing.assert_close(shifted, weights, atol=1e-5, rtol=1e-5)


def weights_by_hand(detect, contrast, most):
    """Compute the formula of `arbitrate` for one token, with plain numbers."""
    strength = {m: 1 / (1 + math.exp(-SHARPNESS * z)) for m, z in enumerate(detect) if z > 0}
    claims = {m: a * math.exp(contrast[m]) for m, a in strength.items()}
    kept = sorted(claims, key=lambda m: claims[m], reverse=True)[:most]
    total = min(1.0, sum(strength[m] for m in kept))
    return [
        total * claims[m] / sum(claims[k] for k in kept) if m in kept else 0.0
        for m in range(len(detect))
    ]


@settings(max_examples=100, deadline=None)
@given(seed=seeds, modules=st.integers(1, 6), most=st.integers(1, 6), contrasted=st.booleans())
def test_arbitration_is_its_formula(seed, modules, most, contrasted):
    random = torch.Generator().manual_seed(seed)
    detect = torch.randn(modules, generator=random)
    contrast = contrasted * torch.randn(modules, generator=random)
    got = arbitrate(detect[None, None], contrast[None, None], most)[0, 0]
    want = torch.tensor(weights_by_hand(detect.tolist(), contrast.tolist(), most))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_silent_module_changes_no_other_weight():
    random = torch.Generator().manual_seed(0)
    detect, contrast = (
        torch.randn(1, 50, 3, generator=random),
        torch.randn(1, 50, 3, generator=random),
    )
    silent = torch.full((1, 50, 1), -1.0)
    wider = arbitrate(torch.cat([detect, silent], -1), torch.cat([contrast, silent + 100], -1), 3)
    torch.testing.assert_close(wider[..., :3], arbitrate(detect, contrast, 3))


def test_contrast_decides_between_neighbours():
    weights = arbitrate(torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[10.0, 0.0]]]), 5)
    assert weights[0, 0, 0] > 0.99 * weights.sum()


@settings(max_examples=30, deadline=None)
@given(seed=seeds, modules=st.integers(1, 6), width=st.sampled_from([5, 60]))
def test_contrasts_are_the_logarithms_of_gaussian_densities(seed, modules, width):
    """With fewer factors than the model's width, and with more."""
    random = torch.Generator().manual_seed(seed)
    moments = torch.randn(modules, MOMENTS, width, generator=random)
    moments[:, 1] = moments[:, 1].abs()
    rows = contrasts(moments)
    within = sum(m[1].diag() + m[2:].T @ m[2:] for m in moments.double()) / modules
    within += RIDGE * within.diagonal().mean() * torch.eye(width)
    x = torch.randn(width, generator=random).double()
    score = rows[:, :-1].double() @ x + rows[:, -1]
    # log-density of each Gaussian, up to a term common to all
    density = torch.stack(
        [-0.5 * (x - m[0]) @ torch.linalg.solve(within, x - m[0]) for m in moments.double()]
    )
    torch.testing.assert_close(score - score.mean(), density - density.mean(), atol=1e-3, rtol=1e-3)


def spoken(gates, words_BTM, admitted_BM=None):
    """Return the weights of the modules of a bank without contrasts at the last of three tokens."""
    bank = GateBank.stack(
        gates, [torch.zeros(MOMENTS, 4)] * len(gates), [16.0] * len(gates), 5, torch.device("cpu")
    )
    x_BTD = torch.zeros(1, 3, 4)
    ctx = ForwardContext(None, torch.arange(3)[None])
    return bank.weights(0, x_BTD, ctx, words_BTM, admitted_BM)[0, -1]


def constant_gate(score):
    """A gate that detects with the same score everywhere."""
    return torch.tensor([0.0, 0.0, 0.0, 0.0, score])


@settings(max_examples=100, deadline=None)
@given(score=st.floats(-9.0, 9.0), lower=st.floats(-90.0, 90.0), higher=st.floats(-90.0, 90.0))
def test_more_evidence_never_lowers_a_weight(score, lower, higher):
    lower, higher = sorted((lower, higher))
    gates = [constant_gate(score), constant_gate(0.5)]
    weights = [
        spoken(gates, torch.tensor([nats, 0.0]).expand(1, 3, 2))[0] for nats in (lower, higher)
    ]
    assert weights[0] <= weights[1] + 1e-6


@settings(max_examples=50, deadline=None)
@given(score=st.floats(-9.0, 9.0), nats=st.floats(0.0, 90.0))
def test_enough_evidence_against_silences_any_gate(score, nats):
    assert spoken([constant_gate(score)], torch.full((1, 3, 1), -NATS - nats)) == 0.0


def test_evidence_divides_a_token_among_those_who_fire():
    gates = [constant_gate(1.0), constant_gate(1.0)]
    even = spoken(gates, torch.zeros(1, 3, 2))
    torch.testing.assert_close(even, torch.tensor([0.5, 0.5]))
    first = spoken(gates, torch.tensor([6.0, 0.0]).expand(1, 3, 2))
    assert first[0] > 0.99


def test_who_is_not_admitted_claims_nothing():
    gates = [constant_gate(1.0), constant_gate(1.0)]
    weights = spoken(gates, None, torch.tensor([[True, False]]))
    assert weights[0] > 0.99
    assert weights[1] == 0.0


def test_contrasts_follow_the_set_and_not_its_order():
    moments = torch.randn(4, MOMENTS, 7)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        contrasts(moments[order]), contrasts(moments)[order], atol=1e-4, rtol=1e-4
    )
    assert contrasts(moments[:1]).abs().max() == 0  # there is no other module
    for width in (7, 60):
        assert contrasts(torch.full((2, MOMENTS, width), 3e38)).isfinite().all()


def test_scores_stay_fp32_under_autocast():
    bank = GateBank.stack(
        [*torch.randn(2, 9)], [*torch.randn(2, MOMENTS, 8)], [8.0, 8.0], 5, torch.device("cpu")
    )
    x = torch.randn(1, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = bank.scores(x)
    assert torch.equal(inside, bank.scores(x))


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_combine_equals_the_dense_sum_and_leaves_silent_tokens_alone(seed):
    torch.manual_seed(seed)
    modules = [torch.nn.Linear(6, 6) for _ in range(3)]
    layers = [lambda _, x, module=module: module(x) for module in modules]
    x, y = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    weights = torch.rand(2, 5, 3) * (torch.rand(2, 5, 3) > 0.6)
    got = combine(layers, 0, x, y, weights)
    want = y + sum(module(x) * weights[..., m, None] for m, module in enumerate(modules))
    torch.testing.assert_close(got, want)
    silent = weights.eq(0).all(-1)
    assert torch.equal(got[silent], y[silent])


def test_set_gate_folds_threshold_and_scale(make_module):
    module = make_module("m")
    weight, x = torch.randn(33), torch.randn(32)
    module.set_gate(1, weight, threshold=0.7, scale=3.0)
    detect = module.gates[1] @ torch.cat([x, torch.ones(1)])
    torch.testing.assert_close(detect, (weight @ torch.cat([x, torch.ones(1)]) - 0.7) / 3.0)
