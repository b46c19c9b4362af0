"""DPO and RLOO by TRL, on the pairs and the budget of an `AlignRequest`, as alternatives to compare RLPO with.

TRL puts a forward pass of its own into the Hugging Face model that it trains, so it trains the checkpoint's twin in
`transformers`; the folder that it leaves is read by `DeepSeekModel` as any other of its family. Not resumable.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from deepseek.checkpoint.store import atomic_folder
from deepseek.data.preference_files import record_of
from deepseek.data.preferences import Preference
from deepseek.errors import TrainError
from deepseek.text.chat import encode_prompt
from deepseek.train.layers import parse_layers
from deepseek.train.reward import RewardModel
from deepseek.train.rollout import given

if TYPE_CHECKING:
    from deepseek.train.align import AlignRequest

DPO_BETA, RLOO_BETA = 0.1, 0.05
"""Strength of the pull to the reference in either method: TRL's default, and RLPO's first coefficient."""

ANSWERS = 4
"""Answers that RLOO samples to a prompt, each judged against the mean of the others."""

MINIBATCH = 16
"""Pairs or answers a step, as many as RLPO takes."""


def align_by_trl(
    request: "AlignRequest",
    base: Path,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[Preference],
    reward: RewardModel | Any,
    folder: Path,
    out: Path,
) -> dict[str, Any]:
    """Train the twin of `base` by `request.method` and write it to `out`; return the last figures that TRL logged.

    The budget is RLPO's: as many optimizer steps on answers of the same length, and as many sampled answers.

    Raises:
        TrainError: TRL is not installed, or `transformers` has no model of this family.
    """
    try:
        from datasets import Dataset
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.rloo_config import RLOOConfig
        from trl.trainer.rloo_trainer import RLOOTrainer
    except ImportError:
        raise TrainError("Methods dpo and rloo need TRL; run `pip install trl`, or take --method ppo.") from None
    twin = twin_of(base, request.layers)
    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "learning_rate": request.learning_rate, "seed": request.seed,
        "per_device_train_batch_size": MINIBATCH, "max_steps": request.rollouts * request.rollout_size // MINIBATCH,
        "save_strategy": "no", "report_to": [], "logging_steps": 1, "disable_tqdm": True, "bf16": True,
        "use_cpu": twin.device.type == "cpu", "gradient_checkpointing": False, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    trainer: Any
    if request.method == "dpo":
        sides = ("prompt", "chosen", "rejected")
        rows = Dataset.from_list([{side: record[side] for side in sides} for record in map(record_of, pairs)])
        trainer = DPOTrainer(twin, args=DPOConfig(**common, beta=DPO_BETA), train_dataset=rows,
                             processing_class=tokenizer)  # fmt: skip
    else:
        asked = {repr(pair.prompt): [dict(message) for message in pair.prompt] for pair in pairs}
        rows = Dataset.from_list([{"prompt": prompt} for prompt in asked.values()])

        def score(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
            ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
            scores: list[float | None] = reward(given(reward.base, ids, completion_ids)).tolist()
            return scores

        arguments = RLOOConfig(**common, beta=RLOO_BETA, num_generations=ANSWERS, temperature=request.temperature,
                               max_completion_length=request.new_tokens)  # fmt: skip
        trainer = RLOOTrainer(twin, score, arguments, rows, processing_class=tokenizer)
    trainer.train()
    with atomic_folder(out) as temporary:
        trainer.model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    logged = [record for record in trainer.state.log_history if "loss" in record]
    return {"trl": logged[-1] if logged else {}}


def twin_of(base: Path, layers: str) -> Any:
    """Return the Hugging Face model of a checkpoint in fp32, frozen but for `layers`."""
    try:
        twin = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
        blocks = twin.model.layers
    except (ValueError, AttributeError):
        raise TrainError(f"{base} is of no family that TRL can train; take --method ppo.") from None
    twin.requires_grad_(False)
    for index in parse_layers(layers, len(blocks)):
        blocks[index].requires_grad_(True)
    return twin
