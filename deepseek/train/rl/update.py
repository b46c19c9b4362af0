"""`rlpo_update`: one RLPO iteration for custom training loops."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek import checks
from deepseek.engine.vocabulary import end_ids
from deepseek.errors import ConfigError, TrainError
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import encode_plain
from deepseek.train.loop.optim import OptimConfig, adamw, clip_gradients
from deepseek.train.loop.position import Position
from deepseek.train.rl.policy import VALUE_PACES, Policy
from deepseek.train.rl.rlpo import Learner, Minibatch, Reward
from deepseek.train.rl.rlpo_config import RLPOConfig


class RLPOState:
    """State between calls of `rlpo_update`: reference, value head, optimizer, moments,
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
        ends: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        """Use the present `model` as the reference, and cast it to fp32.

        Args:
            model: model to train.
            reward_model: scores responses.
            config: hyperparameters; default: `RLPOConfig()`.
            layers: layers to train, "all" or "last:N".
            optim: optimizer settings; default: a learning rate of 1e-5, and `VALUE_PACES` for the
                value head. The rate stays at its peak: without a number of steps there is no
                schedule.
            ends: ids of the tokens that end a response; None: the end tokens of the model's
                generation config; empty: no token ends one.
            seed: seed of the sampling.

        Raises:
            ConfigError: an argument is wrong.
        """
        checks.instance("model", model, DeepSeekModel)
        checks.function("reward_model", reward_model)
        checks.optional(partial(checks.instance, kind=RLPOConfig))("config", config)
        checks.optional(partial(checks.instance, kind=OptimConfig))("optim", optim)
        ends = end_ids(model) if ends is None else ends
        ends = checks.token_ids("ends", ends, model.config.vocab_size)
        seed = checks.whole("seed", seed, least=0, most=checks.MAX_SEED)
        context = model.config.max_position_embeddings
        config = config or RLPOConfig()
        checks.whole("new_tokens", config.new_tokens, least=1, most=context - 1)
        self.optim = optim or OptimConfig(learning_rate=1e-5, paces=VALUE_PACES)
        policy = Policy(model.float(), layers, config.temperature)
        self.learner = Learner(policy, reward_model, config, ends)
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
    """Make one RLPO iteration: sample answers to the prompts, score them, update the model.

    Args:
        model: model to train. It is converted to fp32 in place, and stays so: a bf16 model takes
            twice its memory from the first call on.
        reward_model: scores responses, see `Reward`; for example a `RewardModel` or a `TextReward`.
        data_batch: `prompts` as a list of texts (with a `tokenizer`), a list of id lists, or a
            tensor of ids.
        tokenizer: encodes prompts that are texts; default: none.
        state: state of the previous call, initially `RLPOState(model, reward_model, ...)`, which
            takes all options; its first `value_rollouts` calls train the value head alone. None: a
            new state with default options, for a single call, so that the policy learns with an
            untrained value head.

    Returns:
        `score` (before the update), `kl` to the reference in nats per response, `entropy`, `beta`,
        `loss`, `skipped` (optimizer steps skipped so far for non-finite values or a spike of the
        loss) and others.

    Raises:
        ConfigError: there are no prompts, a prompt is empty, too long or has ids outside the
            vocabulary, the state is of another model or reward, or the reward does not return one
            finite number for each response.
        TrainError: the prompts are texts without a tokenizer, the policy has collapsed, or ten
            steps in a row had non-finite values.
    """
    checks.instance("model", model, DeepSeekModel)
    checks.optional(partial(checks.instance, kind=RLPOState))("state", state)
    given = checks.mapping("data_batch", data_batch)
    if "prompts" not in given:
        raise ConfigError(f"data_batch has no `prompts` but {', '.join(given) or 'nothing'}.")
    prompts = prompt_ids(given["prompts"], tokenizer, model.config.vocab_size)
    state = state or RLPOState(model, reward_model, RLPOConfig(value_rollouts=0))
    learner = state.learner
    if learner.policy.model is not model or learner.reward is not reward_model:
        raise ConfigError("state was made for another model or reward; give those, or a new state.")
    config = state.learner.config
    learn = state.rollouts >= config.value_only_rollouts
    rollout, metrics = learner.collect(prompts, state.generator)
    state.rollouts += 1
    learner.scalars["stop"].zero_()
    places = list(range(-(-len(rollout.mask_BT) // config.minibatch))) * config.epochs
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


def prompt_ids(
    prompts: Any, tokenizer: PreTrainedTokenizerFast | None, vocab_size: int
) -> list[list[int]]:
    """Return prompts as lists of ids.

    Args:
        prompts: texts, lists of ids, or a tensor of ids `[B, T]`.
        tokenizer: encodes texts; None: none are expected.
        vocab_size: number of tokens of the model's vocabulary.

    Raises:
        ConfigError: there are no prompts, or one is empty or no list of ids of the vocabulary.
        TrainError: the prompts are texts, and there is no tokenizer.
    """
    if isinstance(prompts, Tensor):
        prompts = checks.tensor("prompts", prompts, "whole", dims=(2,)).tolist()
    items = checks.sequence("prompts", prompts, lambda _, item: item, "texts or lists of ids")
    if not items:
        raise ConfigError("prompts is empty; give at least one prompt.")
    if isinstance(items[0], str):
        if tokenizer is None:
            raise TrainError("The prompts are texts; give a tokenizer, or prompts as token ids.")
        items = encode_plain(tokenizer, checks.texts("prompts", items))
    return [
        checks.prompt(f"prompts[{place}]", item, vocab_size) for place, item in enumerate(items)
    ]
