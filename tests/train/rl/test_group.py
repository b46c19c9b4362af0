"""GRPO's and GSPO's formulas (`train/rl/group.py`) against loops written from the papers, and RLPO
that compares answers within groups.
"""

import math
from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rl_fixtures import batch, learner, prompts, tiny

from deepseek.errors import ConfigError
from deepseek.train.rl.group import group_advantages, reference_kl, sequence_log_ratio
from deepseek.train.rl.ppo import log_ratio, policy_loss
from deepseek.train.rl.rlpo import Minibatch, RolloutBatches
from deepseek.train.rl.rlpo_config import RLPOConfig

GROUPS = {"baseline": "group", "group_size": 4}


@given(st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=5))
def test_advantages_are_scores_standardised_within_their_group(groups: list[list[int]]) -> None:
    scores = torch.tensor(groups, dtype=torch.float64).flatten()
    found = group_advantages(scores, 4).view(-1, 4).tolist()
    for group, row in zip(groups, found, strict=True):
        expected = [(score - fmean(group)) / (pstdev(group) + 1e-4) for score in group]
        assert row == pytest.approx(expected, abs=1e-9)
        assert sum(row) == pytest.approx(0.0, abs=1e-9)


@given(st.integers(0, 10_000))
def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens(seed: int) -> None:
    logprobs, old, _, mask = batch(seed)
    found = sequence_log_ratio(log_ratio(logprobs, old, mask), mask)
    for row in range(len(mask)):
        real = mask[row] > 0
        differences = (logprobs - old)[row, real].tolist()
        expected = math.prod(math.exp(one) for one in differences) ** (1 / max(1, len(differences)))
        for value in found[row, real].exp().tolist():
            assert value == pytest.approx(expected, rel=1e-4)
        assert not found[row, ~real].any()


@given(st.integers(0, 10_000))
def test_the_loss_of_sequences_is_that_of_the_paper(seed: int) -> None:
    """arXiv:2507.18071, eq. 5, weighted by the lengths of the responses."""
    logprobs, old, _, mask = batch(seed)
    generator = torch.Generator().manual_seed(seed)
    advantage_B = torch.randn(len(mask), generator=generator)
    found = policy_loss(
        sequence_log_ratio(log_ratio(logprobs, old, mask), mask),
        advantage_B[:, None] * mask,
        mask,
        clip=0.1,
    )
    terms = []
    for row, advantage in enumerate(advantage_B.tolist()):
        real = mask[row] > 0
        if not real.any():
            continue
        ratio = math.exp(fmean((logprobs - old)[row, real].tolist()))
        held = min(max(ratio, 0.9), 1.1)
        terms += [min(ratio * advantage, held * advantage)] * int(real.sum())
    expected = -sum(terms) / max(1, len(terms))
    assert float(found.loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(st.integers(0, 10_000))
def test_the_divergence_from_the_reference_is_never_negative(seed: int) -> None:
    logprobs, reference, _, mask = batch(seed)
    assert float(reference_kl(logprobs, reference, mask)) >= 0.0
    assert float(reference_kl(logprobs, logprobs, mask)) == 0.0


def test_the_estimate_of_the_divergence_has_the_right_mean() -> None:
    """Over all tokens, weighted by the policy, the mean of the k3 estimate is the KL divergence."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 9, generator=generator).log_softmax(-1)
    terms = torch.stack(
        [
            reference_kl(policy[None, None, token], reference[None, None, token], torch.ones(1, 1))
            for token in range(9)
        ]
    )
    assert float((policy.exp() * terms).sum()) == pytest.approx(
        float((policy.exp() * (policy - reference)).sum()), rel=1e-5
    )


def test_the_answers_to_a_prompt_lie_next_to_each_other() -> None:
    trained = learner(tiny(), **GROUPS)
    rollout, _ = trained.collect(prompts(3), torch.Generator().manual_seed(0))
    asked = [prompt for prompt in prompts(3) for _ in range(4)]
    assert rollout.prompts() == asked
    means = (rollout.advantages_BT.sum(1) / rollout.mask_BT.sum(1)).view(-1, 4).mean(1)
    assert torch.allclose(means, torch.zeros(3), atol=1e-5)


@pytest.mark.parametrize("routing", [{}, {"num_experts": 16, "expert_dim": 8}])
def test_the_first_update_starts_at_a_ratio_of_one(routing: dict[str, int]) -> None:
    trained = learner(tiny(**routing), ratio="sequence", **GROUPS)
    rollout, _ = trained.collect(prompts(4), torch.Generator().manual_seed(0))
    output = trained.loss(Minibatch(rollout.rows(0, 8), 0, True), 0)
    assert output.metrics["ratio"] == 0.0 and output.metrics["clipped"] == 0.0
    assert "value_loss" not in output.metrics


def test_a_rollout_is_a_multiple_of_the_group() -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        RolloutBatches(learner(tiny(), **GROUPS), prompts(), 18, seed=0)


@pytest.mark.parametrize(
    "wrong", [{"baseline": "none"}, {"group_size": 1}, {"ratio": "word"}], ids=str
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        RLPOConfig(**wrong)
