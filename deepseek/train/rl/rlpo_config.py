"""Hyperparameters of RLPO, and the check of a reward's scores."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from deepseek import checks
from deepseek.train.rl.rollout import Responses


@dataclass(frozen=True)
class RLPOConfig:
    """Hyperparameters of RLPO.

    Attributes:
        baseline: what a response is compared with. "value": the value head's expectation at each
            token (PPO). "group": the other responses to the same prompt (GRPO); there is no value
            loss then, and the KL to the reference is part of the loss, not of the rewards.
        group_size: responses to each prompt with baseline "group".
        ratio: probability ratio that is clipped: of each "token", or of the whole "sequence",
            normalised by its length (GSPO). Ratios of sequences lie much closer to 1, so they need
            a smaller `clip`.
        new_tokens: maximum tokens per response.
        temperature: sampling temperature; log-probabilities are taken at the same temperature.
        minibatch: responses per optimizer step.
        epochs: passes over the responses of a rollout.
        gamma: discount per token.
        lam: decay of generalised advantage estimation.
        clip: largest change of a probability ratio from the rollout's before clipping.
        value_clip: largest change of a value from the rollout's before clipping.
        value_weight: weight of the value loss. The optimizer's steps do not depend on the scale of
            a gradient, but its norm is clipped together with the policy's: with a large weight, the
            worse the values are, the less the policy would learn.
        value_rollouts: number of first rollouts that train only the value head (baseline "value").
        beta: coefficient of the KL penalty without any KL, in standardised reward per nat.
        target_kl: KL to the reference to stay near or below, in nats per response: the coefficient
            grows exponentially with the KL (`penalty_coefficient`). None: it is constant.
        kl_stop: KL to the rollout's policy, in nats per token, at which a new rollout starts; the
            minibatch that shows it does not train the policy.
        entropy_floor: share of the first rollout's entropy below which the policy counts as
            collapsed.
        replay_routing: replay the routing decisions of the rollout in the updates.
    """

    baseline: Literal["value", "group"] = "value"
    group_size: int = 4
    ratio: Literal["token", "sequence"] = "token"
    new_tokens: int = 32
    temperature: float = 1.0
    minibatch: int = 16
    epochs: int = 2
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.5
    value_weight: float = 0.01
    value_rollouts: int = 1
    beta: float = 0.05
    target_kl: float | None = 6.0
    kl_stop: float = 0.05
    entropy_floor: float = 0.2
    replay_routing: bool = True

    def __post_init__(self) -> None:
        checks.apply(RLPO, self)

    @property
    def answers(self) -> int:
        """Responses to each prompt."""
        return self.group_size if self.baseline == "group" else 1

    @property
    def value_only_rollouts(self) -> int:
        """First rollouts that do not train the policy."""
        return self.value_rollouts if self.baseline == "value" else 0


_count = partial(checks.whole, least=1, most=checks.MAX_SIZE)
_weight = partial(checks.number, least=0)

RLPO: dict[str, checks.Check] = {
    "baseline": partial(checks.choice, valid=("value", "group")),
    "group_size": partial(checks.whole, least=2, most=checks.MAX_SIZE),
    "ratio": partial(checks.choice, valid=("token", "sequence")),
    "new_tokens": _count,
    "temperature": partial(checks.number, least=0.01, most=100),
    "minibatch": _count,
    "epochs": partial(checks.whole, least=1, most=1000),
    "gamma": partial(checks.number, least=0, most=1),
    "lam": partial(checks.number, least=0, most=1),
    "clip": partial(checks.number, above=0),
    "value_clip": partial(checks.number, above=0),
    "value_weight": _weight,
    "value_rollouts": partial(checks.whole, least=0),
    "beta": _weight,
    "target_kl": checks.optional(partial(checks.number, above=0)),
    "kl_stop": checks.number,  # a negative one starts a new rollout after each step
    "entropy_floor": partial(checks.number, least=0, most=1),
    "replay_routing": checks.flag,
}
"""Type and range of each field of `RLPOConfig`."""


def checked_scores(scores: Any, responses: Responses) -> Tensor:
    """Return the scores `[B]` of a reward in fp32, on the device of the responses.

    Args:
        scores: what the reward returned.
        responses: the responses that it scored.

    Raises:
        ConfigError: there is not one finite number for each response.
    """
    name = "scores of the reward"
    if not isinstance(scores, Tensor):
        scores = torch.tensor(checks.sequence(name, scores, checks.number, "numbers"))
    rows = len(responses.real_BS)
    if not scores.is_floating_point():
        checks.tensor(name, scores, "whole")
        scores = scores.float()
    checks.tensor(name, scores, "real")
    checks.shape(name, scores, (rows,), "[responses]")
    checks.finite(name, scores)
    return scores.float().to(responses.real_BS.device)
