"""DPO and RLOO by TRL, as baselines for RLPO: the same pairs, budget and schedule.

TRL patches the forward pass of the Hugging Face model that it trains, so it trains the
`transformers` equivalent of the checkpoint; `DeepSeekModel` reads the resulting folder like any
other of that family. TRL runs cannot be resumed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from deepseek.checkpoint.licence import copy_terms
from deepseek.checkpoint.store import atomic_folder
from deepseek.data.preferences.files import record_of
from deepseek.data.preferences.preference import Preference
from deepseek.data.text.loader import endless
from deepseek.errors import TrainError
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.chat_template import encode_prompt
from deepseek.text.tokenizer import encode_plain
from deepseek.train.jobs.arguments import AlignArguments
from deepseek.train.loop.layers import parse_layers
from deepseek.train.rl.pairs import prompts_of
from deepseek.train.rl.rlpo import Reward, RunningMoments
from deepseek.train.rl.rlpo_config import RLPOConfig
from deepseek.train.rl.rollout import given

DPO_BETA = 0.1
"""KL coefficient of DPO, TRL's default."""

RLOO_BETA = 0.05
"""KL coefficient of RLOO, equal to RLPO's initial one."""

ANSWERS = 4
"""Answers to each prompt where they are compared with each other: GRPO, GSPO and RLOO."""

MINIBATCH = 16
"""Pairs or answers per optimizer step, as in RLPO."""

EPOCHS = RLPOConfig().epochs
"""Optimizer steps on each minibatch of answers, as in RLPO."""

POOL = 16
"""DPO minibatches per pool; pairs are sorted by length within a pool."""

WARMUP, FINAL_RATE = 0.05, 0.2
"""Share of the steps in which the learning rate rises, and its last value as a share of the peak,
as in RLPO.
"""


@dataclass(frozen=True)
class TRLRun:
    """Inputs of a TRL run.

    Attributes:
        arguments: arguments of the alignment.
        base: folder of the checkpoint.
        tokenizer: its tokenizer.
        pairs: pairs to learn from.
        device: where to train.
        dtype: precision of the training, and of the model that is written.
        folder: run folder.
        out: folder of the new model.
        reward: returns the reward, and the model for which its `Responses` are built.
    """

    arguments: AlignArguments
    base: Path
    tokenizer: PreTrainedTokenizerFast
    pairs: Sequence[Preference]
    device: torch.device
    dtype: torch.dtype
    folder: Path
    out: Path
    reward: Callable[[], tuple[Reward, DeepSeekModel]]


def by_trl(run: TRLRun) -> dict[str, Any]:
    """Train the checkpoint's Hugging Face equivalent with TRL, write it, and return TRL's last log.

    The budget is RLPO's: the same number of optimizer steps and their schedule. RLOO's answers have
    as many tokens as RLPO's, and RLPO samples as many answers, and a few more when it ends a
    rollout early. DPO learns from the whole answers of the pairs.

    Raises:
        TrainError: `transformers` does not support this family.
    """
    request = run.arguments
    tokenizer = run.tokenizer
    twin = twin_of(run.base, request.layers).to(run.device)
    steps = trl_steps(request)
    common: dict[str, Any] = {
        "output_dir": str(run.folder / "trl"),
        "learning_rate": request.learning_rate,
        "seed": request.seed,
        "per_device_train_batch_size": MINIBATCH,
        "max_steps": steps,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
        "bf16": run.dtype == torch.bfloat16,
        "use_cpu": run.device.type == "cpu",
        "gradient_checkpointing": False,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": FINAL_RATE},
        "warmup_steps": round(WARMUP * steps),
    }
    trainer = (
        dpo_trainer(run, twin, common)
        if request.method == "dpo"
        else rloo_trainer(run, twin, common)
    )
    trainer.train()
    with atomic_folder(run.out) as temporary:
        # RLPO saves its model in this dtype too.
        trainer.model.to(run.dtype).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        copy_terms(run.base, temporary)
    # Steps that reuse answers log neither reward nor length, so the logs are merged.
    last: dict[str, Any] = {}
    for record in trainer.state.log_history:
        last |= record
    return {"trl": last}


def trl_steps(request: AlignArguments) -> int:
    """Return the number of optimizer steps, each on `MINIBATCH` pairs or answers."""
    return request.rollouts * -(-request.rollout_size // MINIBATCH) * EPOCHS


def pair_tokens(tokenizer: PreTrainedTokenizerFast, pair: Preference) -> int:
    """Return the number of tokens of a pair's prompt with the longer answer."""
    answers = encode_plain(tokenizer, [pair.chosen, pair.rejected])
    return len(encode_prompt(tokenizer, pair.prompt)) + max(map(len, answers))


def dpo_trainer(run: TRLRun, twin: Any, common: dict[str, Any]) -> Any:
    """Return TRL's trainer for direct preference optimisation (arXiv:2305.18290)."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    lengths = [pair_tokens(run.tokenizer, pair) for pair in run.pairs]
    order = grouped_by_length(lengths, common["max_steps"], run.arguments.seed)
    return DPOTrainer(
        twin,
        # Without a maximum: TRL's of 1,024 tokens would cut the answers behind long prompts.
        args=DPOConfig(
            **common, beta=DPO_BETA, train_sampling_strategy="sequential", max_length=None
        ),
        train_dataset=Dataset.from_list([_sides(run.pairs[place]) for place in order]),
        processing_class=run.tokenizer,
    )


def _sides(pair: Preference) -> dict[str, Any]:
    """Return the fields of a pair that TRL reads."""
    record = record_of(pair)
    return {side: record[side] for side in ("prompt", "chosen", "rejected")}


def grouped_by_length(lengths: Sequence[int], steps: int, seed: int) -> list[int]:
    """Return the indices of the pairs of all steps, with pairs of similar length in a minibatch.

    Rows are padded to the longest of a minibatch: on human conversations, padding doubles a random
    minibatch. Minibatches come in random order, so that no length comes first.

    Args:
        lengths: tokens of each pair.
        steps: number of minibatches.
        seed: seed of the order.
    """
    drawn = endless(0, steps * MINIBATCH, len(lengths), seed).tolist()
    # A pool is at most an epoch; else copies of a pair would be sorted into one minibatch.
    size = MINIBATCH * max(1, min(POOL, len(lengths) // MINIBATCH))
    order: list[int] = []
    for start in range(0, len(drawn), size):
        pool = sorted(drawn[start : start + size], key=lengths.__getitem__)
        batches = [pool[row : row + MINIBATCH] for row in range(0, len(pool), MINIBATCH)]
        for place in endless(0, len(batches), len(batches), seed + start):
            order += batches[place]
    return order


def rloo_trainer(run: TRLRun, twin: Any, common: dict[str, Any]) -> Any:
    """Return TRL's trainer for REINFORCE leave-one-out (arXiv:2402.14740)."""
    from datasets import Dataset
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    request = run.arguments
    tokenizer = run.tokenizer
    reward, model = run.reward()
    prompt_messages = [[dict(message) for message in prompt] for prompt in prompts_of(run.pairs)]
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompt_messages])
    moments = RunningMoments()

    def score(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        # Standardised as RLPO's are, so that both weigh the KL alike.
        scores: list[float | None] = moments.standardised(
            reward(given(model, ids, completion_ids))
        ).tolist()
        return scores

    arguments = RLOOConfig(
        **common,
        beta=RLOO_BETA,
        num_iterations=EPOCHS,
        num_generations=ANSWERS,
        temperature=request.temperature,
        max_completion_length=request.new_tokens,
    )
    return RLOOTrainer(twin, score, arguments, rows, processing_class=tokenizer)


def twin_of(base: Path, layers: str) -> Any:
    """Return the checkpoint as a Hugging Face model in fp32 with all but `layers` frozen.

    Raises:
        TrainError: `transformers` does not support this family.
    """
    try:
        twin = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, trust_remote_code=False
        )
        blocks = twin.model.layers
        norm = twin.model.norm
    except (ValueError, AttributeError):
        raise TrainError(f"TRL can't train the model family of {base}; use --method ppo.") from None
    twin.requires_grad_(False)
    for index in parse_layers(layers, len(blocks)):
        blocks[index].requires_grad_(True)
    norm.requires_grad_(True)  # as in RLPO
    return twin
