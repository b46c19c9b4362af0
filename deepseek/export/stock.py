"""A model as a folder of a stock Hugging Face architecture, where one computes the same."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from deepseek.checkpoint.convert import FAMILIES, convert_config, our_name
from deepseek.errors import ConfigError
from deepseek.export.graph import Step
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel

SAVED = {"architectures", "dtype", "transformers_version"}
"""What `save_pretrained` adds to a config."""


def write_stock(model: DeepSeekModel, folder: Path) -> Step:
    """Write the model as the Hugging Face architecture that computes the same.

    Raises:
        ConfigError: there is none; the message names what stands in the way.
    """
    if model.experts.armed() is not None:
        raise ConfigError("No stock architecture has plugged experts; export the base alone, or use --to onnx.")
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(stock_config(model.config), dtype=model.dtype)
    own, names = model.state_dict(), {name: our_name(name) for name in stock.state_dict()}
    stock.load_state_dict({name: own.pop(ours) for name, ours in names.items()}, assign=True)
    if any(tensor.any() for name, tensor in own.items() if name.endswith(".balance.bias")):
        raise ConfigError("No stock architecture has this router's balance bias; use --to onnx.")
    stock.generation_config = model.generation_config
    stock.save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def step(new: tuple[Tensor, ...], past: Any) -> tuple[Tensor, Any]:
        ids, mask, positions = new
        output = read(ids, attention_mask=mask, position_ids=positions, cache=past, use_cache=True)
        return output.logits, output.cache

    return step


def stock_config(config: ModelConfig) -> Any:
    """Return the config of the first Hugging Face family that, converted to our fields, says what `config` says.

    Raises:
        ConfigError: no family does; the fields of ours that the nearest one cannot say are named.
    """
    idle = {"balance_rate", "target_experts", "use_cache"}  # nothing that a forward pass reads
    if all(config.is_sparse(layer) for layer in range(config.num_hidden_layers)):
        idle.add("intermediate_size")
    missed = {}
    for family in FAMILIES:
        known = CONFIG_MAPPING[family]().to_dict().keys() | {"head_dim"}
        raw = {key: value for key, value in _in_all_words(config, family).items() if key in known - SAVED}
        again, names = ModelConfig(**convert_config(raw)), ModelConfig.__annotations__.keys() - idle
        missed[family] = [one for one in names if (getattr(again, one) or None) != (getattr(config, one) or None)]
        if not missed[family]:
            return CONFIG_MAPPING[family](**raw)
    nearest = min(missed, key=lambda family: len(missed[family]))
    reason = ", ".join(f"{name}={getattr(config, name)!r}" for name in sorted(missed[nearest]))
    raise ConfigError(f"No stock architecture has {reason} (the nearest is {nearest}); keep the model's own folder.")


def _in_all_words(config: ModelConfig, family: str) -> dict[str, Any]:
    """Return `config` as all families say it; Mixtral and OLMoE call `expert_dim` intermediate_size."""
    layers, window = range(config.num_hidden_layers), config.sliding_window
    full = layers if window is None else config.full_attention_layers or ()
    words = config.to_dict() | {
        "model_type": family, "use_sliding_window": window is not None,
        "layer_types": ["full_attention" if layer in full else "sliding_attention" for layer in layers],
        "num_local_experts": config.num_experts, "num_experts_per_tok": config.max_experts,
        "norm_topk_prob": config.router_renormalize, "moe_intermediate_size": config.expert_dim,
        "mlp_only_layers": config.dense_layers or [],
    }  # fmt: skip
    return words | ({"intermediate_size": config.expert_dim} if family in ("mixtral", "olmoe") else {})
