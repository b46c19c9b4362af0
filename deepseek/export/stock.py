"""Export to an equivalent Transformers architecture, if there is one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from deepseek.checkpoint.convert import FAMILIES, GEMMA, convert_config, our_name
from deepseek.errors import CheckpointError, ConfigError
from deepseek.export.graph import Step
from deepseek.model.config import ModelConfig
from deepseek.model.support import (
    LSH_FIELDS,
    MIXTURE_FIELDS,
    NOT_COMPUTED_WITH,
    any_of,
    unsupported,
)
from deepseek.model.transformer import DeepSeekModel

SAVED_KEYS = {"architectures", "dtype", "transformers_version"}
"""Keys that `save_pretrained` adds to a config."""

UNREAD_FIELDS = {"balance_rate", "target_experts", "use_cache"}
"""Fields that no forward pass reads, so that an architecture need not have them."""

RULES = any_of(
    (
        *NOT_COMPUTED_WITH,
        *LSH_FIELDS,
        *MIXTURE_FIELDS,
        "attention",
        "attention_bias",
        "attention_output_bias",
        "attn_logit_softcapping",
        "clip_qkv",
        "final_logit_softcapping",
        "full_attention_layers",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "local_rope_theta",
        "max_position_embeddings",
        "num_attention_heads",
        "num_experts",
        "num_hidden_layers",
        "num_key_value_heads",
        "positional_encoding",
        "post_norms",
        "qk_norm",
        "query_pre_attn_scalar",
        "rms_norm_eps",
        "rope_parameters",
        "scale_embeddings",
        "sliding_window",
        "tie_word_embeddings",
        "train_len",
        "unit_offset_norms",
        "vocab_size",
    )
)
"""Fields that are compared with those of an architecture. No architecture has any other field, so a
model that uses one cannot be exported.
"""


def write_stock(model: DeepSeekModel, folder: Path) -> Step:
    """Write the model as the Hugging Face architecture that computes the same; return how to run
    it.

    Args:
        model: the model, without armed experts.
        folder: an existing, empty folder.

    Raises:
        ConfigError: there is no such architecture; the message names the fields without a
            counterpart.
    """
    if model.experts.armed() is not None:
        raise ConfigError(
            "No stock architecture has plugged experts; export the base alone, or use --to onnx."
        )
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(
            stock_config(model.config), dtype=model.dtype, trust_remote_code=False
        )
    tensors = model.state_dict()
    stock.load_state_dict(
        {
            name: tensors.pop(our_name(name, post_norms=model.config.post_norms))
            for name in stock.state_dict()
        },
        assign=True,
    )
    if any(tensor.any() for name, tensor in tensors.items() if name.endswith(".balance.bias")):
        raise ConfigError("No stock architecture has this router's balance bias; use --to onnx.")
    stock.generation_config = model.generation_config
    stock.save_pretrained(folder)
    reloaded_model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )

    def step(new: tuple[Tensor, ...], past: Any) -> tuple[Tensor, Any]:
        ids, mask, positions = new
        output = reloaded_model(
            ids, attention_mask=mask, position_ids=positions, cache=past, use_cache=True
        )
        return output.logits, output.cache

    return step


def stock_config(config: ModelConfig) -> Any:
    """Return the config of the first Hugging Face family that, converted to our fields, equals
    `config`.

    Args:
        config: the model's config.

    Raises:
        ConfigError: no family does; the message names the fields that differ from the nearest one.
    """
    reason = unsupported(config, RULES)
    if reason is not None:
        raise ConfigError(f"No stock architecture has {reason}; keep the model's own folder.")
    compared_names = ModelConfig.__annotations__.keys() - UNREAD_FIELDS
    if all(config.is_sparse(layer) for layer in range(config.num_hidden_layers)):
        compared_names -= {"intermediate_size"}
    differences = {}
    for family in FAMILIES:
        family_fields = CONFIG_MAPPING[family]().to_dict().keys() | {"head_dim"}
        raw = {
            key: value
            for key, value in _in_their_names(config, family).items()
            if key in family_fields - SAVED_KEYS
        }
        try:
            converted_config = ModelConfig(**convert_config(raw))
        except CheckpointError:  # the family cannot have such a field, such as another activation
            continue
        differences[family] = [
            name
            for name in compared_names
            if _value(converted_config, name) != _value(config, name)
        ]
        if not differences[family]:
            return CONFIG_MAPPING[family](**raw)
    if not differences:
        raise ConfigError(
            f"No stock architecture has hidden_act={config.hidden_act!r} with the other fields; "
            "keep the model's own folder."
        )
    nearest_family = min(differences, key=lambda family: len(differences[family]))
    reason = ", ".join(
        f"{name}={getattr(config, name)!r}" for name in sorted(differences[nearest_family])
    )
    raise ConfigError(
        f"No stock architecture has {reason} (the nearest is {nearest_family}); "
        "keep the model's own folder."
    )


def _value(config: ModelConfig, name: str) -> Any:
    """Return a field's value to compare; absent, false and default values count as equal."""
    default = config.head_dim if name == "query_pre_attn_scalar" else None
    return getattr(config, name) or default


def _in_their_names(config: ModelConfig, family: str) -> dict[str, Any]:
    """Return the fields of `config`, also under the names that the families use.

    Mixtral and OLMoE call `expert_dim` intermediate_size.
    """
    layers = range(config.num_hidden_layers)
    window = config.sliding_window
    full_layers = layers if window is None else config.full_attention_layers or ()
    values = config.to_dict() | {
        "model_type": family,
        "use_sliding_window": window is not None,
        "layer_types": [
            "full_attention" if layer in full_layers else "sliding_attention" for layer in layers
        ],
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.max_experts,
        "norm_topk_prob": config.router_renormalize,
        "moe_intermediate_size": config.expert_dim,
        "mlp_only_layers": config.dense_layers or [],
    }
    if family in GEMMA:
        scalar = config.query_pre_attn_scalar or config.head_dim
        values |= {
            "hidden_activation": config.hidden_act,
            # The families' configs take no float.
            "query_pre_attn_scalar": int(scalar) if float(scalar).is_integer() else scalar,
        }
    if family == "gemma3_text":
        rotary = config.rope_parameters or {}
        local_theta = config.local_rope_theta or rotary.get("rope_theta", 1e4)
        values["rope_parameters"] = {
            "full_attention": rotary,
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        }
    if family in ("mixtral", "olmoe"):
        values["intermediate_size"] = config.expert_dim or config.intermediate_size
    return values
