"""`rlpo_update`: one step of RLPO outside the loop, for those who write a loop of their own."""

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
    """What lasts from one `rlpo_update` of a model to the next: reference, values, optimizer,
    controller, guards.
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
        """Take `model`, from now on in fp32, as it is for the reference."""
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
    """Make one RLPO step: answer the prompts, score the answers, update the model by PPO.

    Args:
        reward_model: scores responses, see `Reward`; a `RewardModel` or a `TextReward` is one.
        data_batch: `prompts`, a list of texts (with a `tokenizer`), of id lists, or a tensor of
            ids.
        state: what the step before left behind, from `RLPOState(model, reward_model, ...)`, which
            takes all options; None makes a first step with default ones.

    Returns:
        `score` (before the update), `kl` to the reference in nats a response, `entropy`, `beta`,
        `loss`, `skipped`
        (optimizer steps left out so far, as by the loop: for non-finite values or a spike of the
            loss) and others.

    Raises:
        TrainError: the policy has collapsed, or ten steps in a row had values that are not finite.
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
    """Return prompts as lists of ids."""
    if isinstance(prompts, Tensor):
        return [[int(i) for i in row] for row in prompts]
    if prompts and isinstance(prompts[0], str):
        if tokenizer is None:
            raise TrainError("The prompts are texts; give a tokenizer, or prompts as token ids.")
        return encode_plain(tokenizer, prompts)
    return [list(map(int, prompt)) for prompt in prompts]
