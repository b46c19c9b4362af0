"""Proximal policy optimisation as pure functions on tensors: rewards, advantages, losses, and the
coefficient of the KL penalty.

These functions don't depend on a model. Rows are the responses of B prompts, columns their T
tokens. `mask_BT` is 1.0 at response tokens and 0.0 at padding; values at padding have no effect.
Sources: PPO arXiv:1707.06347, GAE arXiv:1506.02438, the per-token KL penalty arXiv:1909.08593, the
k3 estimator joschu.net/blog/kl-approx.html.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

AT_TARGET, MOST = 10.0, 3.0
"""Growth of the KL penalty's coefficient from no KL to the target, and the largest KL that it grows
to, in targets: a single rollout may have a response of infinite KL.
"""


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over response tokens, 0 if there are none."""
    return torch.where(mask_BT > 0, x_BT, 0.0).sum() / mask_BT.sum().clamp(min=1.0)


def whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return x with mean 0 and variance 1 over response tokens, and 0 elsewhere."""
    centred_BT = torch.where(mask_BT > 0, x_BT - masked_mean(x_BT, mask_BT), 0.0)
    return centred_BT * torch.rsqrt(masked_mean(centred_BT.square(), mask_BT) + 1e-8)


def token_rewards(
    scores_B: Tensor, logprobs_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor, beta: float
) -> Tensor:
    """Return rewards `[B, T]`: -beta (log p - log p_reference) per token, plus the score at the
    last.

    This is arXiv:1909.08593, eq. 2, distributed over the tokens. A response without tokens gets no
    score.

    Args:
        scores_B: score of each response.
        logprobs_BT: log-probabilities under the policy.
        reference_BT: log-probabilities under the reference.
        mask_BT: response tokens.
        beta: coefficient of the KL penalty.
    """
    rewards_BT = torch.where(mask_BT > 0, -beta * (logprobs_BT - reference_BT), 0.0)
    places = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = torch.where(mask_BT > 0, places, -1).amax(dim=1)
    return rewards_BT + torch.where(places == last_B[:, None], scores_B[:, None], 0.0)


def advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return generalised advantages and value targets, both `[B, T]` (arXiv:1506.02438, eq. 16).

    A_t = d_t + gamma lam A_(t+1) with d_t = r_t + gamma V_(t+1) - V_t over the response tokens of a
    row; the value after the last one is 0. Padding may come before, after and within the response.
    """
    advantage_B = torch.zeros_like(rewards_BT[:, 0])
    next_value_B = torch.zeros_like(rewards_BT[:, 0])
    columns = []
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        real_B = mask_BT[:, t] > 0
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = torch.where(real_B, delta_B + gamma * lam * advantage_B, advantage_B)
        next_value_B = torch.where(real_B, values_BT[:, t], next_value_B)
        columns.append(torch.where(real_B, advantage_B, 0.0))
    advantages_BT = torch.stack(columns[::-1], dim=1)
    return advantages_BT, torch.where(mask_BT > 0, advantages_BT + values_BT, 0.0)


@dataclass(frozen=True)
class PolicyLoss:
    """Clipped loss and its diagnostics.

    Attributes:
        loss: scalar to minimise.
        clipped: share of the tokens whose loss is clipped.
        ratio: largest distance of a probability ratio from 1.
    """

    loss: Tensor
    clipped: Tensor
    ratio: Tensor


def k3(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the k3 estimate of a KL divergence in nats per token, a scalar that is never negative
    (arXiv:2402.03300, eq. 4).

    Args:
        log_ratio_BT: log q - log p of each token, drawn from p, for KL(p || q).
        mask_BT: response tokens.
    """
    return masked_mean(log_ratio_BT.exp() - 1.0 - log_ratio_BT, mask_BT)


def log_ratio(logprobs_BT: Tensor, old_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return log p - log p_old `[B, T]`, 0 at padding."""
    return torch.where(mask_BT > 0, logprobs_BT - old_BT, 0.0)


def policy_loss(
    log_ratio_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, clip: float = 0.2
) -> PolicyLoss:
    """Return the clipped loss -mean min(rho A, clip(rho, 1 - clip, 1 + clip) A), rho = p / p_old.

    Source: arXiv:1707.06347, eq. 7.

    Args:
        log_ratio_BT: log rho of each token, or of the response that it belongs to; 0 at padding.
        advantages_BT: advantage A of each token.
        mask_BT: response tokens.
        clip: largest distance of rho from 1 that an update is paid for.
    """
    ratio_BT = log_ratio_BT.exp()
    unclipped_BT = ratio_BT * advantages_BT
    clipped_BT = ratio_BT.clamp(1.0 - clip, 1.0 + clip) * advantages_BT
    with torch.no_grad():
        clipped = masked_mean((clipped_BT < unclipped_BT).float(), mask_BT)
        furthest = (ratio_BT - 1.0).abs().amax()
    return PolicyLoss(
        -masked_mean(torch.minimum(unclipped_BT, clipped_BT), mask_BT), clipped, furthest
    )


def value_loss(
    values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float = 0.2
) -> Tensor:
    """Return half the squared error of the values, or of values clipped near the old ones if
    larger.
    """
    clipped_BT = old_BT + (values_BT - old_BT).clamp(-clip, clip)
    worse_BT = torch.maximum((values_BT - returns_BT).square(), (clipped_BT - returns_BT).square())
    return 0.5 * masked_mean(worse_BT, mask_BT)


def penalty_coefficient(beta: float, kl: float, target: float | None) -> float:
    """Return the coefficient of the KL penalty for a rollout: exponential in its KL, and at the
    target `AT_TARGET` times `beta`.

    An integral controller (arXiv:1909.08593, eq. 3) only answers to a KL above the target: in a run
    of 24 rollouts it raised the coefficient when the KL was at nearly twice its target and the
    learning rate too low to come back (docs/log/alignment.md, 2026-12-02).

    Args:
        beta: coefficient without any KL.
        kl: mean KL of the rollout's responses, in nats per response; a negative estimate counts
            as 0.
        target: KL to stay at or below, in nats per response; None: the coefficient is `beta`.
    """
    if target is None:
        return beta
    exponent = min(MOST, max(0.0, kl) / target)
    return float(beta * AT_TARGET**exponent)
