"""`deepseek.align`: align a model with preferences.

pairs -> reward model on a frozen trunk -> RLPO on the prompts, by PPO, GRPO or GSPO -> a model
folder

DPO and RLOO by TRL (`align_trl`) serve as baselines.
"""

from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass as declaration
from torch import nn
from transformers import PreTrainedTokenizerFast

from deepseek.checkpoint.files import located
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.licence import copy_terms
from deepseek.checkpoint.store import atomic_folder, home, write_json
from deepseek.data.preferences.database import PreferenceDatabase
from deepseek.data.preferences.preference import Preference
from deepseek.device.choose import choose_device, choose_dtype
from deepseek.engine.vocabulary import Vocabulary
from deepseek.errors import ConfigError, DataError, TrainError
from deepseek.model.config import ModelConfig
from deepseek.model.pretrained import read_config
from deepseek.model.transformer import DeepSeekModel
from deepseek.registry import pick
from deepseek.text.chat_template import encode_prompt
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.gates.public_text import remember_adapted
from deepseek.train.jobs.align_trl import (
    ANSWERS,
    FINAL_RATE,
    MINIBATCH,
    WARMUP,
    TRLRun,
    by_trl,
    pair_tokens,
    trl_steps,
)
from deepseek.train.jobs.arguments import AlignArguments
from deepseek.train.jobs.declaration import DECLARED, job
from deepseek.train.loop.layers import parse_layers
from deepseek.train.loop.loop import Hooks, LoopConfig, train
from deepseek.train.loop.metrics import read_metrics
from deepseek.train.loop.optim import OptimConfig
from deepseek.train.loop.progress import ProgressBar
from deepseek.train.loop.runs import Run, run_once
from deepseek.train.rl.judge import JUDGES, TextReward
from deepseek.train.rl.pairs import answer_ids, prompts_of
from deepseek.train.rl.policy import VALUE_PACES, Policy
from deepseek.train.rl.reward import RewardModel, features_of
from deepseek.train.rl.rlpo import Learner, Reward, RolloutBatches
from deepseek.train.rl.rlpo_config import RLPOConfig
from deepseek.train.rl.rollout import generate
from deepseek.train.text.inputs import base_digest, preferences_digest

FEWEST_PAIRS = 8
"""Minimum number of pairs for training, and for the held-out set."""

HELD_OUT_PROMPTS = 32
"""Held-out prompts to answer at each evaluation."""

UPDATES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "grpo": {"baseline": "group", "group_size": ANSWERS},
    "gspo": {"baseline": "group", "group_size": ANSWERS, "ratio": "sequence", "clip": 0.02},
}
"""Settings of RLPO by method."""


@declaration(kw_only=True, frozen=True, config=DECLARED)
class AlignRequest(AlignArguments):
    """Resolved arguments of an alignment, stored as `request.json`."""

    prefs: str


@job(AlignArguments)
def align(arguments: AlignArguments) -> Path:
    """Align a model with preferences and return the folder of the new model. The same call resumes
    a run.

    Raises:
        DataError, TrainError, ConfigError, HubError: the message states the cause and the fix.
        KeyboardInterrupt: after Ctrl-C; the message says how to resume.
    """
    prefs = located(arguments.prefs or home() / "preferences.db")
    request = AlignRequest(**{**vars(arguments), "prefs": str(prefs)})
    run = Run.of(
        request,
        home() / "models" / request.name,
        lambda _: {"preferences": preferences_digest(prefs), "base": base_digest(request.base)},
    )
    return run_once(AlignRun, request, run)


class AlignRun:
    """One alignment in its run folder."""

    def __init__(
        self, request: AlignRequest, folder: Path, out: Path, progress: ProgressBar
    ) -> None:
        self.request = request
        self.folder = folder
        self.out = out
        self.progress = progress
        self.device = choose_device(request.device)
        self.dtype = choose_dtype(request.dtype, self.device)
        self.method: Callable[[AlignRun], dict[str, Any]] = pick(METHODS, request.method, "method")
        answers = UPDATES.get(request.method, {}).get("group_size", 1)
        if request.rollout_size % answers:
            raise ConfigError(
                f"rollout_size={request.rollout_size} must be a multiple of {answers}: method "
                f"{request.method} gives each prompt {answers} answers."
            )
        self.base = resolve(request.base)
        config = ModelConfig(**read_config(self.base))
        parse_layers(request.layers, config.num_hidden_layers)
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(self.base)
        context = config.max_position_embeddings
        database = PreferenceDatabase(request.prefs)
        self.pairs, self.held_out = (
            self.fitting(list(database.pairs(split)), context) for split in ("train", "eval")
        )
        database.close()
        if min(len(self.pairs), len(self.held_out)) < FEWEST_PAIRS:
            raise DataError(
                f"There are {len(self.pairs)} pairs to learn from and {len(self.held_out)} held "
                f"out; at least {FEWEST_PAIRS} of each are needed, so import more or hold out "
                "another share."
            )
        if request.reward != "model":
            pick(JUDGES, request.reward, "reward")
        if request.method not in UPDATES and find_spec("trl") is None:
            raise TrainError(
                "Methods dpo and rloo need TRL; run `pip install trl`, or take --method ppo."
            )

    def fitting(self, pairs: list[Preference], context: int) -> list[Preference]:
        """Return the pairs that fit `context` tokens; say how many are left out.

        DPO learns from the answers of the pairs. For the other methods a prompt has to leave room
        for a new answer.
        """
        fit = [pair for pair in pairs if self.tokens_with_answer(pair) <= context]
        if len(fit) < len(pairs):
            self.progress.say(
                f"{len(pairs) - len(fit)} pairs are left out, as prompt and answer are longer than "
                f"the model's context of {context} tokens"
            )
        return fit

    def tokens_with_answer(self, pair: Preference) -> int:
        """Return the most tokens that a pair's prompt and an answer can have in training."""
        if self.request.method == "dpo":
            return pair_tokens(self.tokenizer, pair)
        return len(encode_prompt(self.tokenizer, pair.prompt)) + self.request.new_tokens

    def estimate(self) -> str:
        """Return the amount of work: pairs, prompts, and sampled answers or DPO's steps."""
        request = self.request
        if request.method == "dpo":
            work = f"{trl_steps(request):,} steps of {MINIBATCH} pairs"
        else:
            answers = request.rollouts * request.rollout_size
            work = f"{answers:,} answers of at most {request.new_tokens} tokens"
        return (
            f"{len(self.pairs)} pairs of {len(prompts_of(self.pairs))} prompts, "
            f"{len(self.held_out)} held out; {work}"
        )

    def run(self) -> dict[str, Any]:
        """Train and write the model; return the figures of the run."""
        write_json(self.folder / "request.json", self.request.as_json())
        figures = self.method(self)
        remember_adapted(self.out, self.base)
        return {"model": str(self.out), **figures}

    def load(self) -> DeepSeekModel:
        """Return the base model on the job's device."""
        return DeepSeekModel.from_pretrained(self.base, dtype=self.dtype, device_map=self.device)

    def rlpo(self) -> dict[str, Any]:
        """Train with RLPO, write the model, and return KL, held-out score and reward quality."""
        request = self.request
        model = self.load()
        first = parse_layers(request.layers, len(model.layers))[0]
        reward, quality = self.reward(model, first)
        config = RLPOConfig(
            new_tokens=request.new_tokens,
            temperature=request.temperature,
            target_kl=request.target_kl,
            **UPDATES[request.method],
        )
        policy = Policy(model, request.layers, request.temperature)
        ends = tuple(Vocabulary(model, self.tokenizer).ends)
        prompts = [encode_prompt(self.tokenizer, prompt) for prompt in prompts_of(self.pairs)]
        unseen = [
            encode_prompt(self.tokenizer, prompt)
            for prompt in prompts_of(self.held_out)[:HELD_OUT_PROMPTS]
        ]

        def evaluate() -> dict[str, float]:
            draw = torch.Generator(model.device).manual_seed(request.seed)
            answers = generate(
                model, unseen, config.new_tokens, ends, draw, temperature=config.temperature
            )
            return {"held_out_score": float(reward(answers).mean())}

        learner = Learner(policy, reward, config, ends, evaluate)
        batches = RolloutBatches(learner, prompts, request.rollout_size, request.seed)
        value_steps = config.value_only_rollouts * batches.steps_a_rollout
        loop = self.loop_config(request.rollouts * batches.steps_a_rollout, value_steps)
        result = train(
            learner,
            batches,
            loop,
            self.folder / "training",
            progress=self.progress,
            hooks=Hooks(buffers=batches.buffers),
        )
        with atomic_folder(self.out) as temporary:
            nn.Module.to(model, self.dtype).save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            copy_terms(self.base, temporary)
        records = [
            record
            for record in read_metrics(self.folder / "training" / "metrics.jsonl")
            if "kl" in record
        ]
        return {
            "reward_model": quality,
            "kl": records[-1]["kl"],
            "held_out_score": result.metrics["held_out_score"],
        }

    def loop_config(self, steps: int, value_steps: int) -> LoopConfig:
        """Return the settings of the loop.

        Args:
            steps: optimizer steps.
            value_steps: the first of them, in which the value head alone learns.
        """
        optim = OptimConfig(
            learning_rate=self.request.learning_rate,
            warmup=warmup(value_steps, steps),
            final=FINAL_RATE,
            paces=VALUE_PACES,
        )
        return LoopConfig(
            optim,
            steps=steps,
            evaluate_every=max(1, steps // 5),
            checkpoint_every=max(10, steps // 10),
            seed=self.request.seed,
        )

    def by_trl(self) -> dict[str, Any]:
        """Train by TRL, write the model, and return TRL's figures."""

        def reward() -> tuple[Reward, DeepSeekModel]:
            model = self.load()
            first = parse_layers(self.request.layers, len(model.layers))[0]
            return self.reward(model, first)[0], model

        return by_trl(
            TRLRun(
                self.request,
                self.base,
                self.tokenizer,
                self.pairs,
                self.device,
                self.dtype,
                self.folder,
                self.out,
                reward,
            )
        )

    def reward(self, model: DeepSeekModel, layer: int) -> tuple[Reward, dict[str, Any]]:
        """Return the requested reward, and the quality of a fitted one on the held-out pairs.

        Args:
            model: model whose trunk computes the reward model's features.
            layer: block whose input the reward model reads; 0: the middle block of an untrained
                copy.
        """
        if self.request.reward != "model":
            return TextReward(self.tokenizer, pick(JUDGES, self.request.reward, "reward")), {}
        if layer == 0:  # its input is the bare embeddings, without context
            model, layer = self.load(), len(model.layers) // 2
        saved = self.folder / "reward"
        if not saved.is_dir():
            prompt_index = {
                repr(prompt): index for index, prompt in enumerate(prompts_of(self.pairs))
            }
            prompts = [prompt_index[repr(pair.prompt)] for pair in self.pairs]
            RewardModel.choose(
                model, layer, *self.features(model, layer, self.pairs), prompts
            ).save(saved)
        fitted = RewardModel.load(model, saved)
        quality = fitted.quality(*self.features(model, layer, self.held_out))
        self.progress.say(
            f"reward model: {quality.accuracy:.1%} of {quality.pairs} held-out pairs right, "
            f"calibration error {quality.calibration_error:.3f}"
        )
        return fitted, asdict(quality)

    def features(
        self, model: DeepSeekModel, layer: int, pairs: list[Preference]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reward model's features of the chosen and of the rejected answers."""
        prompts = [encode_prompt(self.tokenizer, pair.prompt) for pair in pairs]
        chosen, rejected = (
            answer_ids(self.tokenizer, texts, self.request.new_tokens)
            for texts in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
        )
        return features_of(model, layer, prompts, chosen), features_of(
            model, layer, prompts, rejected
        )


METHODS = {**dict.fromkeys(UPDATES, AlignRun.rlpo), "dpo": AlignRun.by_trl, "rloo": AlignRun.by_trl}


def warmup(value_steps: int, steps: int) -> float:
    """Return the share of the steps in which the learning rate rises.

    Args:
        value_steps: first steps, in which only the value head learns; the warm-up is extended so
            that the policy's first step has at most a third of the peak rate.
        steps: all steps.
    """
    return min(0.5, max(WARMUP, 3 * (value_steps + 1) / steps)) if value_steps else WARMUP
