"""Random LoRA adapters for a small Llama checkpoint, created and saved by PEFT itself."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def save_llama(folder: Path) -> Path:
    """Save a random three-layer Llama model and its tokenizer in `folder` and return it."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int = 1, std: float = 0.1, **changes: Any) -> Path:
    """Save an adapter with two random factors in `folder` and return it.

    Args:
        base: folder of the base model.
        folder: folder to write.
        seed: seed of the values.
        std: standard deviation of the values.
        changes: fields of `LoraConfig`; default: rank 8 on all projections of the attention.
    """
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model,
        LoraConfig(**{"r": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | changes),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def peft_logits(base: Path, adapter: Path | None, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits that PEFT computes with an adapter, or the base alone."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()(ids).logits


def write_adapter(
    folder: Path, layers: dict[str, tuple[int, int]], rank: int = 4, seed: int = 1, **config: Any
) -> Path:
    """Write an adapter of random values in PEFT's format, without PEFT, and return its folder.

    Args:
        folder: folder to write.
        layers: name of each linear layer -> its numbers of inputs and outputs.
        rank: rank of the adapter.
        seed: seed of the values.
        config: fields of `adapter_config.json` to change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs) in layers.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder
