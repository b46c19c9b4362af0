"""RLPO: reinforcement learning from preferences by PPO, as a step of its own and as a stream of
batches for the loop.

One step: sample responses, score them, then several passes of clipped updates over them. See
`ppo.py` for the formulas, `rollout.py` for the sampling and `policy.py` for what is trained.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deepseek.data.text.loader import endless, mix
from deepseek.errors import TrainError
from deepseek.train.loop.loop import LossOutput
from deepseek.train.rl.policy import Policy
from deepseek.train.rl.ppo import (
    advantages,
    masked_mean,
    policy_loss,
    steered,
    token_rewards,
    value_loss,
    whiten,
)
from deepseek.train.rl.rollout import Responses, empty_responses, generate

Reward = Callable[[Responses], Tensor]
"""Scores responses `[B]`."""


@dataclass(frozen=True)
class RLPOConfig:
    """How a policy learns from its own responses.

    Attributes:
        new_tokens: most tokens of a response.
        temperature: at which responses are sampled; their log-probabilities are taken at the same
            one.
        minibatch: responses an optimizer step.
        epochs: passes over the responses of a rollout.
        gamma, lam: discount and the decay of generalised advantages.
        clip, value_clip: how far a probability ratio, and a value, may move from the rollout's.
        value_weight: of the value loss.
        value_rollouts: first rollouts in which only values are learnt.
        beta: first and least coefficient of the KL penalty (nats of standardised reward a nat).
        target_kl: KL to the reference above which the coefficient rises, in nats a response; None
            leaves it alone.
        kl_horizon: responses over which an error of the KL is answered in full.
        kl_stop: KL to the rollout's own policy, in nats a token, at which the rollout is left for a
            new one.
        entropy_floor: share of the first rollout's entropy below which the policy counts as
            collapsed.
        replay_routing: whether the updates send each token to the experts that it was sent to when
            it was sampled.
    """

    new_tokens: int = 32
    temperature: float = 1.0
    minibatch: int = 16
    epochs: int = 2
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.5
    value_weight: float = 0.5
    value_rollouts: int = 1
    beta: float = 0.05
    target_kl: float | None = 6.0
    kl_horizon: int = 100
    kl_stop: float = 0.05
    entropy_floor: float = 0.2
    replay_routing: bool = True


@dataclass(frozen=True)
class Rollout(Responses):
    """Responses, and what their updates learn from.

    Attributes:
        logprobs_BT, values_BT: of the policy that sampled them.
        advantages_BT, returns_BT: whitened advantages, and what values should learn.
    """

    logprobs_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor


@dataclass(frozen=True)
class Minibatch:
    """Some rows of a rollout.

    Attributes:
        rows: these rows.
        place: which minibatch of the rollout it is.
        learn: False while only values are learnt.
        metrics: figures of a rollout just made.
    """

    rows: Rollout
    place: int
    learn: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


class Learner:
    """A policy, its reward, and what steers learning: the task of the loop.

    Attributes:
        parameters: those of the policy.
        evaluate: returns whatever the caller measures between steps.
        scalars: the controller's beta, running moments of the scores, the first entropy, and
            whether the rollout is to be left: 0-dimensional fp64 tensors, changed in place so that
            a checkpoint can hold them.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        config: RLPOConfig,
        ends: Sequence[int] = (),
        evaluate: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """Learn with `config`; the tokens `ends` end a response."""
        self.policy = policy
        self.reward = reward
        self.config = config
        self.ends = tuple(ends)
        self.parameters = policy.parameters
        self.evaluate = evaluate
        start = {
            "beta": config.beta,
            "count": 0.0,
            "mean": 0.0,
            "squares": 0.0,
            "entropy": 0.0,
            "stop": 0.0,
        }
        self.scalars = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in start.items()
        }
        self.streams: dict[int, Tensor] = {}

    def collect(
        self,
        prompts: Sequence[Sequence[int]],
        generator: torch.Generator,
        learn: bool,
        width: int | None = None,
    ) -> tuple[Rollout, dict[str, float]]:
        """Sample and score one response to each prompt; return what to learn from it and figures to
        record.
        """
        config = self.config
        target = self.config.target_kl
        responses = generate(
            self.policy.model,
            prompts,
            config.new_tokens,
            self.ends,
            generator,
            temperature=config.temperature,
            prompt_width=width,
        )
        self.streams.clear()
        starts = range(0, len(prompts), config.minibatch)
        parts = [
            self.look(place, responses.rows(i, i + config.minibatch))
            for place, i in enumerate(starts)
        ]
        old_BT, values_BT, entropy_BT, reference_BT, scores_B = (
            torch.cat(part) for part in zip(*parts, strict=True)
        )
        mask_BT = responses.mask_BT
        beta = float(self.scalars["beta"])
        rewards_BT = token_rewards(self.standardised(scores_B), old_BT, reference_BT, mask_BT, beta)
        advantages_BT, returns_BT = advantages(
            rewards_BT, values_BT, mask_BT, config.gamma, config.lam
        )
        kl = float((old_BT - reference_BT).sum() / len(prompts))
        metrics = {
            "score": float(scores_B.mean()),
            "kl": kl,
            "beta": beta,
            "response_tokens": float(mask_BT.sum(1).mean()),
            "entropy": float(masked_mean(entropy_BT, mask_BT)),
        }
        if learn:
            # A KL below its budget needs no cheaper penalty: made so, it overshoots later.
            self.scalars["beta"].fill_(
                max(config.beta, steered(beta, kl, len(prompts), target, config.kl_horizon))
            )
        self.check_entropy(metrics["entropy"])
        whitened_BT = whiten(advantages_BT, mask_BT)
        return Rollout(
            **responses.tensors(),
            logprobs_BT=old_BT,
            values_BT=values_BT,
            advantages_BT=whitened_BT,
            returns_BT=returns_BT,
        ), metrics

    @torch.no_grad()
    def look(
        self, place: int, responses: Responses
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return log-probabilities, values, entropies, reference log-probabilities `[B, T]` and
        scores `[B]`.

        In the minibatches of the updates, so that the first of them finds the same numbers bit for
        bit.
        """
        responses = self.routed(responses)
        stream_BSD = self.stream(place, responses)
        scored = self.policy.score(responses, stream_BSD)
        reference_BT = self.policy.reference_logprobs(responses, stream_BSD)
        return *vars(scored).values(), reference_BT, self.reward(responses).float()

    def loss(self, batch: Minibatch, step: int) -> LossOutput:
        """Return the loss of one minibatch, and ask for a new rollout once the policy has left this
        one's.
        """
        config = self.config
        rows = batch.rows
        responses = self.routed(rows)
        scored = self.policy.score(responses, self.stream(batch.place, responses))
        values = value_loss(
            scored.values_BT, rows.values_BT, rows.returns_BT, rows.mask_BT, config.value_clip
        )
        acted = policy_loss(
            scored.logprobs_BT, rows.logprobs_BT, rows.advantages_BT, rows.mask_BT, config.clip
        )
        metrics = {
            "value_loss": float(values.detach()),
            "policy_loss": float(acted.loss.detach()),
            "clipped": float(acted.clipped),
            "ratio": float(acted.ratio),
            "step_kl": float(acted.kl),
        }
        self.scalars["stop"].fill_(metrics["step_kl"] > config.kl_stop)
        loss = config.value_weight * values + (acted.loss if batch.learn else 0.0)
        return LossOutput(loss, int(rows.mask_BT.sum()), {**metrics, **batch.metrics})

    def stream(self, place: int, responses: Responses) -> Tensor:
        """Return the trunk of the minibatch at `place` of the present rollout, computed once."""
        if place not in self.streams:
            self.streams[place] = self.policy.trunk(responses)
        return self.streams[place]

    def routed(self, responses: Responses) -> Responses:
        """Return responses with the routing to be replayed, if it is."""
        if self.config.replay_routing:
            return responses
        return replace(
            responses,
            choices_BLSC=responses.choices_BLSC[:, :0],
            active_BLS=responses.active_BLS[:, :0],
        )

    def standardised(self, scores_B: Tensor) -> Tensor:
        """Return scores less their running mean, divided by their running deviation, and at most 5
        of them away.
        """
        count, mean, squares = (self.scalars[name] for name in ("count", "mean", "squares"))
        for score in scores_B.double():
            count += 1
            step = score - mean
            mean += step / count
            squares += step * (score - mean)
        deviation = (squares / count).sqrt().clamp(min=1e-3)
        return ((scores_B - mean) / deviation).clamp(-5.0, 5.0).to(scores_B.dtype)

    def check_entropy(self, entropy: float) -> None:
        """Raise `TrainError` if the policy hardly varies any more; the last checkpoint is from
        before that.
        """
        first = self.scalars["entropy"]
        if first == 0.0:
            first.fill_(entropy)
        if entropy < self.config.entropy_floor * float(first):
            raise TrainError(
                f"The policy has collapsed: its entropy fell from {float(first):.2f} to {entropy:.2f} nats a token; "
                "start a new run with a higher beta, a lower target_kl or a lower learning rate."
            )


class RolloutBatches:
    """Minibatches of rollouts for the loop, each rollout made when the one before it is used up."""

    def __init__(
        self, learner: Learner, prompts: Sequence[Sequence[int]], size: int, seed: int
    ) -> None:
        """Answer `size` of the prompts a rollout, in an order that `seed` and the place alone
        decide.
        """
        self.learner = learner
        self.prompts = prompts
        self.size = size
        self.seed = seed
        config = learner.config
        model = learner.policy.model
        self.width = max(map(len, prompts))
        empty = empty_responses(model, size, self.width, config.new_tokens)
        blank = [torch.zeros_like(empty.mask_BT) for _ in range(4)]
        self.rollout = Rollout(*empty.tensors().values(), *blank)
        self.made = self.used = 0

    @property
    def steps_a_rollout(self) -> int:
        """Optimizer steps that a rollout is used for, unless it is left before."""
        return -(-self.size // self.learner.config.minibatch) * self.learner.config.epochs

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the parameters."""
        return {**self.rollout.tensors(), **self.learner.scalars}

    def next(self) -> Minibatch:
        """Return the next minibatch, of a new rollout if need be."""
        config = self.learner.config
        metrics = {}
        if self.made == 0 or self.used >= self.steps_a_rollout or self.learner.scalars["stop"]:
            metrics = self.make()
        per_epoch = self.steps_a_rollout // config.epochs
        place = self.used % per_epoch
        self.used += 1
        rows = self.rollout.rows(place * config.minibatch, (place + 1) * config.minibatch)
        return Minibatch(rows, place, self.made > config.value_rollouts, metrics)

    def make(self) -> dict[str, float]:
        """Make the next rollout and return its figures."""
        generator = torch.Generator(self.learner.policy.model.device).manual_seed(
            mix(mix(self.seed) ^ self.made) >> 1
        )
        chosen = endless(
            self.made * self.size, (self.made + 1) * self.size, len(self.prompts), self.seed
        )
        prompts = [self.prompts[index] for index in chosen]
        learn = self.made >= self.learner.config.value_rollouts
        made, metrics = self.learner.collect(prompts, generator, learn, self.width)
        for name, tensor in self.rollout.tensors().items():
            tensor.copy_(getattr(made, name))
        self.made = self.made + 1
        self.used = 0
        self.learner.scalars["stop"].zero_()
        return metrics

    def state(self) -> dict[str, int]:
        """Return the place; the rollout itself is in `buffers`."""
        return {"made": self.made, "used": self.used}

    def load(self, state: dict[str, int]) -> None:
        """Go on at a place."""
        self.made = state["made"]
        self.used = state["used"]
