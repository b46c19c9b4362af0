"""A small base model in a folder, and packs of random experts for it."""

from pathlib import Path
from typing import Any

import torch
from tiny_tokenizer import tiny_tokenizer

from deepseek.engine.load import Loaded
from deepseek.model.config import ModelConfig
from deepseek.model.experts import ExpertModule
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.pack import write_pack


def save_base(folder: Path, **changes: Any) -> Path:
    """Save a random three-layer model, with `changes` to its config, and its tokenizer in `folder`
    and return it.
    """
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = ModelConfig(**fields | changes)
    DeepSeekModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_expert(loaded: Loaded, name: str, folder: Path, seed: int = 1) -> Path:
    """Write a pack of a random expert whose gates fire at every token."""
    module = ExpertModule.beside(loaded.model.layers, name, [1, 2], 16, seed=seed)
    torch.manual_seed(seed)
    for layer in module.layers:
        torch.nn.init.normal_(module.at(layer).down_proj, std=0.3)
        always = torch.zeros(module.hidden_size + 1)
        always[-1] = 1.0
        module.set_gate(layer, always)
    path = folder / f"{name}.safetensors"
    write_pack(path, module.requires_grad_(False).to_pack(loaded.model.experts.base, "Apache-2.0"))
    return path
