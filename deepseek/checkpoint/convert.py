"""Convert checkpoints of Hugging Face families to our config fields and tensor names.

This module maps dictionaries to dictionaries and depends on no model class. To add a family, add a
row to `FAMILIES`. Config defaults come from the family's config class in `transformers`.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from deepseek.checkpoint.fingerprint import each_tensor, weight_files
from deepseek.errors import CheckpointError, shown
from deepseek.registry import nearest

OWN_TYPE = "deepseek_dmoe"

MAX_LAYERS = 1024
"""Maximum layers of a model, as in a pack's manifest."""

_COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "rope_parameters",
)

# Rules from Hugging Face's tensor names to ours, applied in order.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.", ""),
    (r"\.self_attn\.", ".attention."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".feed_forward_norm."),
    (r"\.pre_feedforward_layernorm\.", ".feed_forward_norm."),
    (r"\.post_feedforward_layernorm\.", ".feed_forward_post_norm."),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.mlp\.gate\.", ".feed_forward.router."),
    (r"\.mlp\.", ".feed_forward."),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w3\.", ".up_proj."),
    (r"\.w2\.", ".down_proj."),
)
# In blocks with four norms, that name is of a norm of the attention's output.
_POST_NORM = (r"\.post_attention_layernorm\.", ".attention_post_norm.")
_ONE_EXPERT = re.compile(r"^(.*\.experts)\.(\d{1,6})\.(gate_proj|up_proj|down_proj)\.weight$")
# Older checkpoints hold these frequencies, which follow from the config.
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


# Supported families, and the field values that a family implies without listing them in its config.
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"post_norms": True, "scale_embeddings": True, "unit_offset_norms": True},
    "gemma3_text": {
        "post_norms": True,
        "qk_norm": "head",
        "scale_embeddings": True,
        "unit_offset_norms": True,
    },
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "olmoe": {"qk_norm": "width"},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": "head"},
    "qwen3_moe": {"qk_norm": "head"},
}

GEMMA = ("gemma2", "gemma3_text")


def _translate_config(hf_config: Any) -> dict[str, Any]:
    """Return the `ModelConfig` fields of a Hugging Face config, with its family's defaults."""
    values = {field.name: getattr(hf_config, field.name) for field in fields(hf_config)}
    layers = range(values["num_hidden_layers"])
    types = values.get("layer_types")
    bias = bool(values.get("attention_bias"))
    # Not from `values`: some classes take a `head_dim` that they do not declare.
    common_values = {name: getattr(hf_config, name, None) for name in _COMMON_FIELDS}
    model_fields: dict[str, Any] = {
        name: value
        for name, value in common_values.items()
        if value is not None and not _means_no_token(name, value, values["vocab_size"])
    } | {
        "attention_bias": bias,
        "attention_output_bias": bias,
        "clip_qkv": values.get("clip_qkv"),
        "sliding_window": values.get("sliding_window"),
    }
    if model_fields["sliding_window"] and types:
        model_fields["full_attention_layers"] = [i for i in layers if types[i] == "full_attention"]
    if count := values.get("num_experts") or values.get("num_local_experts"):
        dense_indices = values.get("mlp_only_layers") or ()
        step = values.get("decoder_sparse_step", 1)
        model_fields |= {
            "num_experts": count,
            "expert_dim": values.get("moe_intermediate_size") or values["intermediate_size"],
            "max_experts": values["num_experts_per_tok"],
            "routing_strategy": "topk",
            "router_score": "softmax",
            "router_renormalize": bool(values.get("norm_topk_prob", True)),
            "dense_layers": [i for i in layers if i in dense_indices or (i + 1) % step],
        }
    if hf_config.model_type in GEMMA:
        model_fields |= _gemma_fields(hf_config.model_type, values)
    return model_fields


def _gemma_fields(family: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the `ModelConfig` fields that only Gemmas have.

    Args:
        family: one of `GEMMA`.
        values: fields of the Hugging Face config, with the defaults of its class.

    Raises:
        CheckpointError: a feature is not supported.
    """
    if values.get("use_bidirectional_attention"):
        raise CheckpointError("Models with use_bidirectional_attention=true are not supported.")
    model_fields = {
        "hidden_act": values["hidden_activation"],
        "query_pre_attn_scalar": values["query_pre_attn_scalar"],
        # Gemma 3's attention ignores the field: its queries and keys are normed instead.
        "attn_logit_softcapping": values["attn_logit_softcapping"] if family == "gemma2" else None,
        "final_logit_softcapping": values["final_logit_softcapping"],
    }
    rotary = values["rope_parameters"]
    if "sliding_attention" not in rotary:
        return model_fields
    local_rope = rotary["sliding_attention"]
    if local_rope.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"rope_parameters of type {shown(local_rope['rope_type'])} on sliding attention are "
            "not supported; use a model whose windowed layers have unscaled angles."
        )
    return model_fields | {
        "rope_parameters": rotary["full_attention"],
        "local_rope_theta": local_rope["rope_theta"] if values["sliding_window"] else None,
    }


def convert_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the `ModelConfig` fields for the content of a `config.json`.

    Args:
        raw: content of the `config.json` of any supported family.

    Raises:
        CheckpointError: the family or one of its features is not supported.
    """
    family = str(raw.get("model_type", ""))[:80]
    if family == OWN_TYPE:
        dropped = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype"}
        return {
            key: value
            for key, value in raw.items()
            if key not in dropped and not key.startswith("_")
        }
    if family not in FAMILIES:
        raise CheckpointError(
            f"Models of type {family!r} are not supported; {nearest(family, FAMILIES)}."
        )
    if raw.get("quantization_config"):
        raise CheckpointError(
            "The checkpoint is quantised; use the unquantised folder of the same model."
        )
    if family not in GEMMA and raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"hidden_act={shown(raw['hidden_act'])} is not supported; only models with 'silu' load."
        )
    if raw.get("mlp_bias"):
        raise CheckpointError(
            "Checkpoints with mlp_bias=true are not supported; use one without biases in the MLP."
        )
    layers = raw.get("num_hidden_layers", 1)
    if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS:
        raise CheckpointError(
            f"num_hidden_layers={shown(layers)} in config.json is no number of layers; fetch the "
            "model again."
        )
    # As in `AutoConfig`: only this class reads which of Mistral's layers have a window.
    kind = "ministral" if family == "mistral" and raw.get("layer_types") else family
    try:
        hf_config = CONFIG_MAPPING[kind](**raw)
        # Once more, as the rotary classes do: the first time is before the class knows
        # `original_max_position_embeddings` beside the rotary parameters.
        hf_config.standardize_rope_params()
        model_fields = _translate_config(hf_config)
    except CheckpointError:
        raise
    except Exception as error:  # the classes of transformers check their fields in many ways
        cause = " ".join(str(error).split())
        raise CheckpointError(
            f"The config.json is no config of the family {family} ({cause:.300}); fetch the model "
            "again."
        ) from None
    return model_fields | FAMILIES[family]


def _means_no_token(name: str, value: Any, vocab_size: int) -> bool:
    """Return whether a field is the id of a special token outside the vocabulary.

    Llama's first checkpoints write `pad_token_id: -1` for a tokenizer without padding.
    """
    return name.endswith("_token_id") and isinstance(value, int) and not 0 <= value < vocab_size


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and memory-mapped tensor of every weight in a model folder.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    for name, _, tensor in each_tensor(weight_files(folder)):
        yield name, tensor


def convert_tensors(
    tensors: Iterator[tuple[str, Tensor]], config: dict[str, Any]
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors under our names.

    Per-expert matrices are stacked into `gate_up_proj` `[E, 2F, D]` and `down_proj` `[E, D, F]`. If
    a dense checkpoint is loaded into a config with routed experts, its feed-forward networks become
    the shared experts. Tensors that are computed from the config are left out.

    Args:
        tensors: name and tensor of every weight.
        config: `ModelConfig` fields of the model to load.

    Raises:
        CheckpointError: a matrix of an expert is missing, or those of experts differ in shape.
    """
    dense: set[int] = set(config.get("dense_layers") or ())
    four = bool(config.get("post_norms"))
    renamed_tensors = {
        our_name(name, post_norms=four): tensor for name, tensor in tensors if not is_computed(name)
    }
    stacked_tensors = _stack_experts(renamed_tensors)
    if config.get("num_experts") and not any(map(is_routed, stacked_tensors)):
        return {_as_shared_expert(name, dense): tensor for name, tensor in stacked_tensors.items()}
    return stacked_tensors


def restore_names(
    tensors: Iterator[tuple[str, Tensor]],
    changed_tensors: Mapping[str, Tensor],
    tied_names: Collection[str] = (),
) -> dict[str, Tensor] | None:
    """Return a checkpoint with changed values, under its original names and in its dtypes.

    A value that equals the original one after a cast to its dtype counts as unchanged, so that the
    original precision is preserved.

    Args:
        tensors: name and tensor of every weight of the checkpoint.
        changed_tensors: changed tensors under our names.
        tied_names: our names of tensors that are tied to others; the checkpoint's copies of them
            are left out, as readers would load a stale copy as an independent tensor.

    Returns:
        The tensors, or None if a changed tensor corresponds to several in the checkpoint (stacked
        experts).
    """
    originals = {}
    unmatched_names = set(changed_tensors)
    has_post_norms = any(".attention_post_norm." in name for name in changed_tensors)
    for name, tensor in tensors:
        parameter = our_name(name, post_norms=has_post_norms)
        if parameter in tied_names:
            continue
        unmatched_names.discard(parameter)
        value = changed_tensors.get(parameter, tensor).detach().cpu()
        is_unchanged = torch.equal(tensor.to(value.dtype), value)
        originals[name] = (tensor if is_unchanged else value.to(tensor.dtype)).contiguous()
    return None if unmatched_names else originals


def is_routed(name: str) -> bool:
    """Return whether a tensor belongs to routed experts, by our name for it."""
    return ".experts." in name or name.startswith("expert_pools.")


def is_computed(name: str) -> bool:
    """Return whether a tensor is computed from the config, so that the checkpoint's is ignored, as
    `transformers` ignores it.
    """
    return _COMPUTED.search(name) is not None


def our_name(name: str, *, post_norms: bool = False) -> str:
    """Return our name for the Hugging Face tensor name `name`.

    Args:
        name: name of the tensor.
        post_norms: whether the model's blocks have four norms (`ModelConfig.post_norms`).
    """
    for pattern, replacement in (_POST_NORM, *_RENAMES) if post_norms else _RENAMES:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def _as_shared_expert(name: str, dense_layers: set[int]) -> str:
    match = re.match(r"^layers\.(\d+)\.feed_forward\.(gate|up|down)_proj\.weight", name)
    if match is None or int(match[1]) in dense_layers:
        return name
    return name.replace(".feed_forward.", ".feed_forward.shared_experts.")


def _stack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    output: dict[str, Tensor] = {}
    parts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in tensors.items():
        match = _ONE_EXPERT.match(name)
        if match is None:
            output[name] = tensor
        else:
            parts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
    for prefix, matrices in parts.items():
        count = 1 + max(index for index, _ in matrices)
        try:
            gate_up = [
                torch.cat((matrices[i, "gate_proj"], matrices[i, "up_proj"])) for i in range(count)
            ]
            down = [matrices[i, "down_proj"] for i in range(count)]
            output[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
            output[f"{prefix}.down_proj"] = torch.stack(down)
        except RuntimeError:
            raise CheckpointError(
                f"The matrices of {prefix} differ in shape; fetch the checkpoint again."
            ) from None
        except KeyError as error:
            raise CheckpointError(
                f"The checkpoint lacks a matrix of {prefix} {error.args[0]}; fetch it again."
            ) from None
    return output
