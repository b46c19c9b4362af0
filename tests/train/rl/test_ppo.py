"""PPO's formulas against loops written from the papers, and the properties that they must have."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rl_fixtures import batch

from deepseek.train.rl.ppo import (
    AT_TARGET,
    advantages,
    k3,
    log_ratio,
    masked_mean,
    penalty_coefficient,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)


def oracle_advantages(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> list[float]:
    """Compute the sum of arXiv:1506.02438, eq. 11 and 16, term by term."""
    after = [*values[1:], 0.0][: len(values)]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, after, strict=True)]
    return [
        sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))
    ]


@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.99, 0.5]), st.sampled_from([1.0, 0.95, 0.0]))
def test_advantages_are_the_papers_sum_over_the_real_tokens(
    seed: int, gamma: float, lam: float
) -> None:
    rewards, values, _, mask = batch(seed)
    found, returns = advantages(rewards, values, mask, gamma, lam)
    for row in range(len(mask)):
        real = mask[row] > 0
        expected = oracle_advantages(
            rewards[row, real].tolist(), values[row, real].tolist(), gamma, lam
        )
        assert found[row, real].tolist() == pytest.approx(expected, abs=1e-5)
        assert not found[row, ~real].any() and not returns[row, ~real].any()
    assert torch.allclose(returns, torch.where(mask > 0, found + values, 0.0))


def test_with_lambda_one_returns_are_the_sums_of_rewards() -> None:
    rewards, values, _, mask = batch(0)
    _, returns = advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    ahead = (rewards * mask).flip(1).cumsum(1).flip(1)
    assert torch.allclose(returns, ahead * mask, atol=1e-5)


@given(st.integers(0, 10_000))
def test_what_lies_under_the_mask_never_matters(seed: int) -> None:
    one, two, three, mask = batch(seed)
    spoilt = [torch.where(mask > 0, x, math.inf) for x in (one, two, three)]
    scores = torch.arange(4.0)
    for function in (
        lambda a, b, c: torch.stack(advantages(a, b, mask)),
        lambda a, b, c: (
            policy_loss(log_ratio(a, b, mask), torch.where(mask > 0, c, 0.0), mask).loss
        ),
        lambda a, b, c: token_rewards(scores, a, b, mask, 0.1),
        lambda a, b, c: whiten(a, mask),
    ):
        assert torch.equal(function(one, two, three), function(*spoilt))


def test_a_score_is_paid_once_at_the_last_token() -> None:
    _, _, _, mask = batch(3)
    same = torch.randn_like(mask)
    scores = torch.tensor([1.0, -2.0, 3.0, 4.0])
    rewards = token_rewards(scores, same, same, mask, beta=0.5)
    assert rewards.sum(1).tolist() == [1.0, -2.0, 3.0, 0.0]
    for row in range(3):
        assert rewards[row, int(mask[row].nonzero().max())] == scores[row]


def test_the_penalty_is_the_log_ratio_to_the_reference() -> None:
    one, two, _, mask = batch(4)
    rewards = token_rewards(torch.zeros(4), one, two, mask, beta=0.3)
    assert torch.allclose(rewards, -0.3 * (one - two) * mask)


def test_where_nothing_moved_the_loss_is_the_advantage_and_nothing_is_clipped() -> None:
    logprobs, _, advantage, mask = batch(5)
    found = policy_loss(log_ratio(logprobs, logprobs.clone(), mask), advantage, mask)
    assert float(found.ratio) == 0.0 and float(found.clipped) == 0.0
    assert torch.allclose(found.loss, -masked_mean(advantage, mask))


@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.2, 0.5]))
def test_the_clipped_loss_is_that_of_the_paper(seed: int, clip: float) -> None:
    logprobs, old, advantage, mask = batch(seed)
    terms = []
    for row, column in (mask > 0).nonzero().tolist():
        ratio = math.exp(float(logprobs[row, column] - old[row, column]))
        held = min(max(ratio, 1 - clip), 1 + clip)
        terms.append(
            min(ratio * float(advantage[row, column]), held * float(advantage[row, column]))
        )
    expected = -sum(terms) / max(1, len(terms))
    found = policy_loss(log_ratio(logprobs, old, mask), advantage, mask, clip)
    assert float(found.loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(st.integers(0, 10_000))
def test_k3_is_never_negative_and_estimates_the_divergence(seed: int) -> None:
    one, two, _, mask = batch(seed)
    assert float(k3(log_ratio(one, two, mask), mask)) >= 0.0
    torch.manual_seed(seed)
    p, q = (torch.randn(7).log_softmax(-1) for _ in range(2))
    drawn = torch.multinomial(p.exp(), 100_000, replacement=True)[None]
    found = k3((q - p)[drawn], torch.ones(1, 100_000))
    assert float(found) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=0.1)


def test_beyond_the_clip_nothing_pulls_further_out() -> None:
    old, mask = torch.zeros(1, 2), torch.ones(1, 2)
    logprobs = torch.tensor([[math.log(1.5), math.log(0.5)]], requires_grad=True)
    policy_loss(log_ratio(logprobs, old, mask), torch.tensor([[1.0, -1.0]]), mask).loss.backward()
    assert logprobs.grad is not None and not logprobs.grad.any()
    logprobs.grad = None
    policy_loss(log_ratio(logprobs, old, mask), torch.tensor([[-1.0, 1.0]]), mask).loss.backward()
    assert (logprobs.grad != 0).all(), "the way back is open"


def test_values_are_not_moved_by_more_than_the_clip_for_the_better() -> None:
    old, returns, mask = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    moved = torch.full((1, 1), 0.5, requires_grad=True)
    value_loss(moved, old, returns, mask, clip=0.2).backward()
    assert moved.grad is not None and not moved.grad.any()
    assert float(value_loss(torch.full((1, 1), 0.1), old, returns, mask)) == pytest.approx(
        0.5 * 0.81
    )


def test_whitened_values_have_mean_zero_and_variance_one() -> None:
    x, _, _, mask = batch(6)
    white = whiten(5 * x + 3, mask)
    assert float(masked_mean(white, mask)) == pytest.approx(0.0, abs=1e-6)
    assert float(masked_mean(white.square(), mask)) == pytest.approx(1.0, abs=1e-4)


def test_the_penalty_grows_tenfold_to_the_target_and_ever_faster_beyond() -> None:
    assert penalty_coefficient(0.05, 0.0, target=6.0) == 0.05
    assert penalty_coefficient(0.05, 6.0, target=6.0) == pytest.approx(0.05 * AT_TARGET)
    steps = [penalty_coefficient(0.05, kl, target=6.0) for kl in (0.0, 3.0, 6.0, 9.0, 12.0)]
    assert [after / before for before, after in pairwise(steps)] == pytest.approx(
        [AT_TARGET**0.5] * 4
    )


@pytest.mark.parametrize("kl", [-1.0, 0.0, 1e9, math.inf])
def test_the_penalty_is_finite_and_never_below_its_start(kl: float) -> None:
    assert 0.05 <= penalty_coefficient(0.05, kl, target=6.0) < math.inf
    assert penalty_coefficient(0.05, kl, target=None) == 0.05


def test_a_bandit_is_solved() -> None:
    torch.manual_seed(0)
    logits = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    pay = torch.linspace(0.0, 1.0, 8)
    mask = torch.ones(64, 1)
    for _ in range(60):
        with torch.no_grad():
            actions = torch.distributions.Categorical(logits=logits).sample((64,))
            old = torch.log_softmax(logits, -1)[actions, None]
            advantage, _ = advantages(pay[actions, None], torch.zeros(64, 1), mask)
            advantage = whiten(advantage, mask)
        for _ in range(4):
            optimizer.zero_grad()
            chosen = torch.log_softmax(logits, -1)[actions, None]
            policy_loss(log_ratio(chosen, old, mask), advantage, mask).loss.backward()
            optimizer.step()
    assert float(torch.softmax(logits, -1)[-1]) > 0.9
