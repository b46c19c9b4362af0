"""RLPO: reinforcement learning from preferences by PPO, or by group baselines (GRPO, GSPO).

Each iteration samples responses, scores them, and makes several passes of clipped updates over
them. `ppo.py` and `group.py` have the formulas, `rollout.py` the sampling, and `policy.py` the
trained model. The training loop runs it as a task with a stream of batches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deepseek.data.text.loader import endless, mix
from deepseek.errors import ConfigError, TrainError
from deepseek.train.loop.loop import LossOutput
from deepseek.train.rl.group import group_advantages, reference_kl, sequence_log_ratio
from deepseek.train.rl.policy import Policy, Scored
from deepseek.train.rl.ppo import (
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
from deepseek.train.rl.rlpo_config import RLPOConfig, checked_scores
from deepseek.train.rl.rollout import Responses, empty_responses, generate

Reward = Callable[[Responses], Tensor]
"""Function that returns scores `[B]` of responses."""


@dataclass(frozen=True)
class Rollout(Responses):
    """Responses with the targets of their updates.

    Attributes:
        logprobs_BT: log-probabilities under the policy that sampled them.
        reference_BT: log-probabilities under the reference.
        values_BT: values under that policy.
        advantages_BT: advantages, whitened or standardised within groups.
        returns_BT: targets of the value head; 0 if groups are compared.
    """

    logprobs_BT: Tensor
    reference_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor


@dataclass(frozen=True)
class Minibatch:
    """Some rows of a rollout.

    Attributes:
        rows: the rows.
        place: index of the minibatch in the rollout.
        learn: whether to train the policy; False while only the value head is trained.
        metrics: figures of a new rollout, else empty.
    """

    rows: Rollout
    place: int
    learn: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


class RunningMoments:
    """Running mean and deviation of scores (Welford 1962).

    Attributes:
        tensors: number of scores, their mean, and the sum of squared differences from it:
            0-dimensional fp64 tensors that change in place.
    """

    def __init__(self) -> None:
        self.tensors = {
            name: torch.zeros((), dtype=torch.float64, device="cpu")
            for name in ("count", "mean", "squares")
        }

    def standardised(self, scores_B: Tensor) -> Tensor:
        """Return scores standardised by the moments so far, theirs included, clipped to [-5, 5]."""
        count, mean, squares = self.tensors.values()
        for score in scores_B.cpu().double():
            count += 1
            step = score - mean
            mean += step / count
            squares += step * (score - mean)
        deviation = (squares / count).sqrt().clamp(min=1e-3)
        return ((scores_B - mean) / deviation).clamp(-5.0, 5.0).to(scores_B.dtype)


class Learner:
    """Policy, reward and KL penalty: the task of the training loop.

    Attributes:
        parameters: parameters of the policy by name.
        evaluate: returns the figures that the caller measures between steps.
        scalars: coefficient of the KL penalty, running moments of the scores, initial entropy, and
            whether to start a new rollout. They are 0-dimensional fp64 tensors that change in
            place, so that checkpoints can hold them.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        config: RLPOConfig,
        ends: Sequence[int] = (),
        evaluate: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """Create the task.

        Args:
            policy: policy to train.
            reward: scores responses.
            config: hyperparameters.
            ends: ids of the tokens that end a response.
            evaluate: returns figures between steps; default: none.
        """
        self.policy = policy
        self.reward = reward
        self.config = config
        self.ends = tuple(ends)
        self.parameters = policy.parameters
        self.evaluate = evaluate
        start = {"beta": config.beta, "entropy": 0.0, "stop": 0.0}
        self.moments = RunningMoments()
        self.scalars = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in start.items()
        } | self.moments.tensors
        self.streams: dict[int, Tensor] = {}

    def collect(
        self, prompts: Sequence[Sequence[int]], generator: torch.Generator, width: int | None = None
    ) -> tuple[Rollout, dict[str, float]]:
        """Sample and score responses; return the rollout and its figures.

        Args:
            prompts: token ids of each prompt; it gets `config.answers` responses, next to each
                other.
            generator: random generator of the sampling.
            width: columns of the prompts; None: those of the longest prompt.
        """
        config = self.config
        asked = [prompt for prompt in prompts for _ in range(config.answers)]
        responses = generate(
            self.policy.model,
            asked,
            config.new_tokens,
            self.ends,
            generator,
            temperature=config.temperature,
            prompt_width=width,
        )
        self.streams.clear()
        starts = range(0, len(asked), config.minibatch)
        parts = [
            self.look(place, responses.rows(i, i + config.minibatch))
            for place, i in enumerate(starts)
        ]
        old_BT, values_BT, entropy_BT, reference_BT, scores_B = (
            torch.cat(part) for part in zip(*parts, strict=True)
        )
        mask_BT = responses.mask_BT
        kl = float((old_BT - reference_BT).sum() / len(asked))
        beta = penalty_coefficient(config.beta, kl, config.target_kl)
        self.scalars["beta"].fill_(beta)
        advantages_BT, returns_BT = self.targets(scores_B, old_BT, reference_BT, values_BT, mask_BT)
        metrics = {
            "score": float(scores_B.mean()),
            "kl": kl,
            "beta": beta,
            "response_tokens": float(mask_BT.sum(1).mean()),
            "entropy": float(masked_mean(entropy_BT, mask_BT)),
        }
        self.check_entropy(metrics["entropy"])
        return Rollout(
            **responses.tensors(),
            logprobs_BT=old_BT,
            reference_BT=reference_BT,
            values_BT=values_BT,
            advantages_BT=advantages_BT,
            returns_BT=returns_BT,
        ), metrics

    def targets(
        self,
        scores_B: Tensor,
        old_BT: Tensor,
        reference_BT: Tensor,
        values_BT: Tensor,
        mask_BT: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return advantages and targets of the value head of a rollout, both `[B, T]`."""
        config = self.config
        if config.baseline == "group":
            group_B1 = group_advantages(scores_B, config.group_size)[:, None]
            return group_B1 * mask_BT, torch.zeros_like(mask_BT)
        beta = float(self.scalars["beta"])
        rewards_BT = token_rewards(
            self.moments.standardised(scores_B), old_BT, reference_BT, mask_BT, beta
        )
        advantages_BT, returns_BT = advantages(
            rewards_BT, values_BT, mask_BT, config.gamma, config.lam
        )
        return whiten(advantages_BT, mask_BT), returns_BT

    @torch.no_grad()
    def look(
        self, place: int, responses: Responses
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return log-probabilities, values, entropies, reference log-probabilities `[B, T]`, scores
        `[B]`.

        It uses the minibatches of the updates, so that the first update sees the same numbers bit
        for bit.
        """
        responses = self.as_read(responses)
        stream_BSD = self.stream(place, responses)
        scored = self.policy.score(responses, stream_BSD)
        reference_BT = self.policy.reference_logprobs(responses, stream_BSD)
        scores_B = checked_scores(self.reward(responses), responses)
        return *vars(scored).values(), reference_BT, scores_B

    def loss(self, batch: Minibatch, step: int) -> LossOutput:
        """Return the loss of one minibatch; request a new rollout if the policy has moved too
        far.
        """
        config = self.config
        rows = batch.rows
        responses = self.as_read(rows)
        scored = self.policy.score(responses, self.stream(batch.place, responses))
        log_ratio_BT = log_ratio(scored.logprobs_BT, rows.logprobs_BT, rows.mask_BT)
        # By token whatever the ratio of the loss: the mean over a response would hide the distance.
        step_kl = float(k3(log_ratio_BT.detach(), rows.mask_BT))
        if config.ratio == "sequence":
            log_ratio_BT = sequence_log_ratio(log_ratio_BT, rows.mask_BT)
        policy_part = policy_loss(log_ratio_BT, rows.advantages_BT, rows.mask_BT, config.clip)
        other, parts = self.penalty(scored, rows)
        metrics = {
            **parts,
            "policy_loss": float(policy_part.loss.detach()),
            "clipped": float(policy_part.clipped),
            "ratio": float(policy_part.ratio),
            "step_kl": step_kl,
        }
        self.scalars["stop"].fill_(step_kl > config.kl_stop)
        # Where an advantage is negative the ratio is not clipped from above, so that a token that
        # has moved far would dominate the step.
        too_far = step_kl > max(config.kl_stop, 0.0)
        loss = other + (policy_part.loss if batch.learn and not too_far else 0.0)
        return LossOutput(loss, int(rows.mask_BT.sum()), {**metrics, **batch.metrics})

    def penalty(self, scored: Scored, rows: Rollout) -> tuple[Tensor, dict[str, float]]:
        """Return the term added to the policy's loss, and its unweighted figure: the weighted loss
        of the value head or, if groups are compared, the weighted KL to the reference.
        """
        config = self.config
        if config.baseline == "group":
            kl = reference_kl(scored.logprobs_BT, rows.reference_BT, rows.mask_BT)
            return float(self.scalars["beta"]) * kl, {"reference_kl": float(kl.detach())}
        value_part = value_loss(
            scored.values_BT, rows.values_BT, rows.returns_BT, rows.mask_BT, config.value_clip
        )
        return config.value_weight * value_part, {"value_loss": float(value_part.detach())}

    def stream(self, place: int, responses: Responses) -> Tensor:
        """Return the trunk's hidden states of a minibatch of this rollout, cached by `place`."""
        if place not in self.streams:
            self.streams[place] = self.policy.trunk(responses)
        return self.streams[place]

    def as_read(self, responses: Responses) -> Responses:
        """Return the responses of a minibatch as the policy reads them: without columns that are
        padding in all of them, and without their routing decisions if these are not replayed.
        """
        responses = responses.trimmed()
        if self.config.replay_routing:
            return responses
        return replace(
            responses,
            choices_BLSC=responses.choices_BLSC[:, :0],
            active_BLS=responses.active_BLS[:, :0],
        )

    def check_entropy(self, entropy: float) -> None:
        """Raise `TrainError` if the policy has collapsed, before the loop writes another
        checkpoint.
        """
        first = self.scalars["entropy"]
        if first == 0.0:
            first.fill_(entropy)
        if entropy < self.config.entropy_floor * float(first):
            raise TrainError(
                f"The policy has collapsed: its entropy fell from {float(first):.2f} to "
                f"{entropy:.2f} nats a token; start a new run with a lower target_kl or a lower "
                "learning rate."
            )


class RolloutBatches:
    """Endless minibatches for the loop; a new rollout starts when the previous one is used up."""

    def __init__(
        self, learner: Learner, prompts: Sequence[Sequence[int]], size: int, seed: int
    ) -> None:
        """Create the stream.

        Args:
            learner: samples and scores the rollouts.
            prompts: token ids of each prompt.
            size: responses per rollout, a multiple of the responses to each prompt.
            seed: with the position, determines the order of the prompts and the sampling.

        Raises:
            ConfigError: `size` is not a multiple of the responses to each prompt.
        """
        self.learner = learner
        self.prompts = prompts
        self.size = size
        self.seed = seed
        config = learner.config
        if size % config.answers:
            raise ConfigError(
                f"A rollout of {size} responses cannot be {config.answers} to each prompt; take a "
                f"multiple of {config.answers}."
            )
        model = learner.policy.model
        self.width = max(map(len, prompts))
        empty = empty_responses(model, size, self.width, config.new_tokens)
        blank = [torch.zeros_like(empty.mask_BT) for _ in range(5)]
        self.rollout = Rollout(*empty.tensors().values(), *blank)
        self.made = self.used = 0

    @property
    def steps_a_rollout(self) -> int:
        """Optimizer steps per rollout, unless it is abandoned earlier."""
        return -(-self.size // self.learner.config.minibatch) * self.learner.config.epochs

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold besides the parameters."""
        return {**self.rollout.tensors(), **self.learner.scalars}

    def next(self) -> Minibatch:
        """Return the next minibatch, sampling a new rollout if necessary."""
        config = self.learner.config
        metrics = {}
        if self.made == 0 or self.used >= self.steps_a_rollout or self.learner.scalars["stop"]:
            metrics = self.make()
        per_epoch = self.steps_a_rollout // config.epochs
        place = self.used % per_epoch
        self.used += 1
        rows = self.rollout.rows(place * config.minibatch, (place + 1) * config.minibatch)
        return Minibatch(rows, place, self.made > config.value_only_rollouts, metrics)

    def make(self) -> dict[str, float]:
        """Sample the next rollout and return its figures."""
        generator = torch.Generator(self.learner.policy.model.device).manual_seed(
            mix(mix(self.seed) ^ self.made) >> 1
        )
        count = self.size // self.learner.config.answers
        chosen = endless(self.made * count, (self.made + 1) * count, len(self.prompts), self.seed)
        prompts = [self.prompts[index] for index in chosen]
        rollout, metrics = self.learner.collect(prompts, generator, self.width)
        for name, tensor in self.rollout.tensors().items():
            tensor.copy_(getattr(rollout, name))
        self.made = self.made + 1
        self.used = 0
        self.learner.scalars["stop"].zero_()
        return metrics

    def state(self) -> dict[str, int]:
        """Return the position; the rollout itself is in `buffers`."""
        return {"made": self.made, "used": self.used}

    def load(self, state: dict[str, int]) -> None:
        """Resume from a position."""
        self.made = state["made"]
        self.used = state["used"]
