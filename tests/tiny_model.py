"""Random models of every architecture, in memory, with their tokenizer."""

from typing import Any

import torch
from tiny_tokenizer import tiny_tokenizer

from deepseek.engine.load import Loaded
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.manifest import BaseDescription

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "window": {"sliding_window": 7},
    "dmoe": {"num_experts": 4, "expert_dim": 16, "num_shared_experts": 1, "max_experts": 2},
    "lsh": {
        "attention": "lsh",
        "lsh_num_buckets": 6,
        "lsh_probes": 2,
        "lsh_bucket_window": 3,
        "lsh_local_window": 7,
        "lsh_sinks": 2,
        "lsh_exact_layers": [0],
        "lsh_rounds": 2,
    },
    "dpe": {"positional_encoding": "dpe", "train_len": 16},
}


def tiny_model(kind: str = "dense", **changes: Any) -> Loaded:
    """Return a three-layer model of `kind`, with `changes` to its config, random parameters and a
    context of 64 tokens.
    """
    tokenizer = tiny_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = ModelConfig(**(shape | KINDS[kind] | changes))
    torch.manual_seed(0)
    model = DeepSeekModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(
                parameter, std=0.02 if "decay" in name or "distance" in name else 0.2
            )
    model.experts.base = BaseDescription(
        name="tiny",
        weights="0" * 64,
        tokenizer="0" * 64,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
    )
    return Loaded(model, tokenizer)
