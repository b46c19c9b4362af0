"""Pretrain a mixture of about 10M parameters on real mixed text, and compare training speed with
the Hugging Face Trainer.

    python benchmarks/pretrain_dmoe.py CORPORA [--tokens 700000] [--parts pretrain speed] [--json FILE]

CORPORA holds one folder of text per domain (`benchmarks/corpora.py`). The first part is
`deepseek.pretrain` with dynamic routing and pools shared by two layers: losses by domain, MaxVio
and idle experts on held-out text. The second part trains the same shape without sharing and with
top-4 routing, which both libraries support: with our loop, and with `Trainer` on Qwen2-MoE with its
fastest expert implementation. Both use bf16 autocast and the same rows and take turns; the speed is
measured over all steps but the first three, as the median of three turns. The parts can be measured
separately; the other part's figures stay in the file.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from entry import existing_path, run_main
from results import write
from transformers import (
    AutoModelForCausalLM,
    Qwen2MoeConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import deepseek
from deepseek.data import RowLoader, TokenShards, clean, read_folder
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import train_tokenizer
from deepseek.train.jobs.language import LanguageTask
from deepseek.train.loop.loop import LoopConfig, train
from deepseek.train.loop.metrics import read_metrics
from deepseek.train.loop.optim import OptimConfig
from deepseek.train.loop.progress import ProgressBar

DOMAINS = {"public-code": 2, "prose": 2, "science": 2, "german": 1, "french": 1, "spanish": 1}
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {
    "num_experts": 16,
    "expert_dim": 128,
    "num_shared_experts": 1,
    "max_experts": 4,
    "candidate_experts": 4,
}
STEPS, WARM_UP, ROWS, LENGTH, TURNS = 15, 3, 8, 512, 3
SMALL = 2  # rows per step of the pretraining: with few tokens, more steps beat larger ones


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", type=existing_path)
    parser.add_argument("--tokens", type=int, default=700_000)
    parser.add_argument(
        "--parts", nargs="+", choices=["pretrain", "speed"], default=["pretrain", "speed"]
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known = options.json and options.json.exists()
    figures: dict[str, Any] = json.loads(options.json.read_text())["figures"] if known else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "pretrain" in options.parts:
            figures |= pretrained(options.corpora, options.tokens, folder)
        if "speed" in options.parts:
            figures |= speeds(options.corpora, folder)
    for key, value in figures.items():
        print(f"{key:32} {value}")
    if options.json:
        write(options.json, {"figures": figures})


def pretrained(corpora: Path, tokens: int, folder: Path) -> dict[str, Any]:
    """Pretrain and return the figures of the run with its loss curve."""
    settings = {
        "name": "bench",
        "tokens": tokens,
        "row_length": LENGTH,
        "batch_rows": SMALL,
        "learning_rate": 1e-3,
        "domains": {
            name: {"folder": str(corpora / name), "weight": w} for name, w in DOMAINS.items()
        },
        "model": {**SHAPE, **EXPERTS, "expert_sharing": 2, "routing_strategy": "dynamic"},
        "evaluate_every": 50,
        "checkpoint_every": 100,
        "held_out_tokens": 8192,
        "out": str(folder / "model"),
        "run_folder": str(folder / "run"),
    }
    deepseek.pretrain(settings)
    records = read_metrics(folder / "run" / "training" / "metrics.jsonl")
    speed = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    curve = [
        (record["step"], round(record["held_out_loss"], 3))
        for record in records
        if "held_out_loss" in record
    ]
    steps = [round(record["max_violation"], 3) for record in records if "max_violation" in record]
    result = json.loads((folder / "run" / "result.json").read_text())["figures"]
    return {
        **result,
        "held_out_curve": curve,
        "batch_max_violation": steps[:: max(1, len(steps) // 10)],
        "dmoe_tokens_per_second": median(speed),
    }


def speeds(corpora: Path, folder: Path) -> dict[str, Any]:
    """Return the tokens per second of both loops on the same rows and their ratio, as medians over
    turns.
    """
    documents, _ = clean(read_folder(corpora / "prose"))
    tokenizer = train_tokenizer((document.text for document in documents), 8192)
    loader = RowLoader(TokenShards.build(documents, tokenizer, folder / "speed"), ROWS, LENGTH)
    turns = [(ours(loader, folder / str(turn)), theirs(loader, folder)) for turn in range(TURNS)]
    mine, others = zip(*turns, strict=True)
    return {
        "ours_tokens_per_second": median(mine),
        "trainer_tokens_per_second": median(others),
        "speed_ratio": median(a / b for a, b in turns),
        "speed_turns": turns,
    }


def ours(loader: RowLoader, folder: Path) -> float:
    """Return the tokens per second of our loop."""
    config = ModelConfig(
        vocab_size=8192, max_position_embeddings=LENGTH, routing_strategy="topk", **SHAPE, **EXPERTS
    )
    task = LanguageTask(DeepSeekModel(config).float().train(), {})
    task.evaluate = dict  # type: ignore[method-assign]
    steps = LoopConfig(
        OptimConfig(learning_rate=1e-3), steps=STEPS, checkpoint_every=1000, evaluate_every=1000
    )
    times: list[float] = []
    next_batch = loader.next

    def timed_next() -> Any:
        times.append(time.perf_counter())
        return next_batch()

    loader.next = timed_next  # type: ignore[method-assign]
    train(task, loader, steps, folder, progress=ProgressBar(quiet=True), hooks=task.hooks)
    loader.next = next_batch  # type: ignore[method-assign]
    return ROWS * LENGTH * (STEPS - 1 - WARM_UP) / (times[-1] - times[WARM_UP])


class Clock(TrainerCallback):
    """Records the start time of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def theirs(loader: RowLoader, folder: Path) -> float:
    """Return the tokens per second of the Hugging Face Trainer on the same rows."""
    config = Qwen2MoeConfig(
        vocab_size=8192,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        norm_topk_prob=True,
        use_cache=False,
        **SHAPE,
    )
    config._experts_implementation = "grouped_mm"
    model = AutoModelForCausalLM.from_config(config)
    ids = loader.rows(list(range(ROWS * STEPS))).input_ids
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder / "theirs"),
        per_device_train_batch_size=ROWS,
        max_steps=STEPS,
        bf16=True,
        use_cpu=True,
        learning_rate=1e-3,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    clock = Clock()
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock]).train()
    return ROWS * LENGTH * (STEPS - 1 - WARM_UP) / (clock.times[-1] - clock.times[WARM_UP])


if __name__ == "__main__":
    torch.manual_seed(0)
    run_main(main)
