"""`rlpo_update`: one RLPO iteration for custom training loops."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek.errors import TrainError
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import encode_plain
from deepseek.train.loop.optim import OptimConfig, adamw, clip_gradients
from deepseek.train.loop.position import Position
from deepseek.train.rl.policy import Policy
from deepseek.train.rl.rlpo import Learner, Minibatch, Reward, RLPOConfig


class RLPOState:
    """State between calls of `rlpo_update`: reference, value head, optimizer, controllers,
    guards.
    """

    def __init__(
        self,
        model: DeepSeekModel,
        reward_model: Reward,
        config: RLPOConfig | None = None,
        *,
        layers: str = "all",
        optim: OptimConfig | None = None,
        ends: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        """Use the present `model` as the reference, and cast it to fp32.

        Args:
            model: model to train.
            reward_model: scores responses.
            config: hyperparameters; default: `RLPOConfig()`.
            layers: layers to train, "all" or "last:N".
            optim: optimizer settings; default: a learning rate of 1e-5.
            ends: ids of the tokens that end a response.
            seed: seed of the sampling.
        """
        self.optim = optim or OptimConfig(learning_rate=1e-5)
        self.learner = Learner(
            Policy(model.float(), layers), reward_model, config or RLPOConfig(), ends
        )
        self.optimizer = adamw(self.learner.parameters, self.optim)
        self.generator = torch.Generator(model.device).manual_seed(seed)
        self.position = Position()
        self.rollouts = 0


def rlpo_update(
    model: DeepSeekModel,
    reward_model: Reward,
    data_batch: Mapping[str, Any],
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    state: RLPOState | None = None,
) -> dict[str, float]:
    """Make one RLPO iteration: sample answers to the prompts, score them, update the model by PPO.

    Args:
        model: model to train.
        reward_model: scores responses, see `Reward`; for example a `RewardModel` or a `TextReward`.
        data_batch: `prompts` as a list of texts (with a `tokenizer`), a list of id lists, or a
            tensor of ids.
        tokenizer: encodes prompts that are texts; default: none.
        state: state of the previous call, initially `RLPOState(model, reward_model, ...)`, which
            takes all options; None: a new state with default options.

    Returns:
        `score` (before the update), `kl` to the reference in nats per response, `entropy`, `beta`,
        `loss`, `skipped` (optimizer steps skipped so far for non-finite values or a spike of the
        loss) and others.

    Raises:
        TrainError: the policy has collapsed, or ten steps in a row had non-finite values.
    """
    state = state or RLPOState(model, reward_model)
    learner = state.learner
    config = state.learner.config
    learn = state.rollouts >= config.value_rollouts
    prompts = prompt_ids(data_batch["prompts"], tokenizer)
    rollout, metrics = learner.collect(prompts, state.generator, learn)
    state.rollouts += 1
    learner.scalars["stop"].zero_()
    places = list(range(-(-len(prompts) // config.minibatch))) * config.epochs
    for step, place in enumerate(places):
        rows = rollout.rows(place * config.minibatch, (place + 1) * config.minibatch)
        output = learner.loss(Minibatch(rows, place, learn), step)
        state.optimizer.zero_grad()
        output.loss.backward()
        norm = clip_gradients(learner.parameters.values(), state.optim.clip_norm)
        loss = float(output.loss.detach())
        if state.position.takes(loss, norm):
            state.optimizer.step()
        state.position.check_divergence(state.optim.learning_rate)
        metrics |= {
            **output.metrics,
            "loss": loss,
            "grad_norm": norm,
            "skipped": state.position.skipped,
        }
        if learner.scalars["stop"]:
            break
    return metrics


def prompt_ids(prompts: Any, tokenizer: PreTrainedTokenizerFast | None) -> list[list[int]]:
    """Return prompts as lists of ids; raise `TrainError` for texts without a tokenizer."""
    if isinstance(prompts, Tensor):
        return [[int(i) for i in row] for row in prompts]
    if prompts and isinstance(prompts[0], str):
        if tokenizer is None:
            raise TrainError("The prompts are texts; give a tokenizer, or prompts as token ids.")
        return encode_plain(tokenizer, prompts)
    return [list(map(int, prompt)) for prompt in prompts]
