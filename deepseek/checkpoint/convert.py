"""Checkpoints of Hugging Face families, in our names.

Pure dictionaries in, pure dictionaries out: this module knows no model class. A new family is one row in `FAMILIES`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.checkpoint.fingerprint import each_tensor, weight_files
from deepseek.errors import CheckpointError
from deepseek.registry import nearest

OWN_TYPE = "deepseek_dmoe"

_COMMON_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters", "rope_theta",
    "rope_scaling",
)  # fmt: skip

# Our name of each tensor, by what Hugging Face calls it; rules apply in order.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.", ""),
    (r"\.self_attn\.", ".attention."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".feed_forward_norm."),
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.mlp\.gate\.", ".feed_forward.router."),
    (r"\.mlp\.", ".feed_forward."),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w3\.", ".up_proj."),
    (r"\.w2\.", ".down_proj."),
)
_ONE_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")


def _llama(raw: dict[str, Any]) -> dict[str, Any]:
    if raw.get("mlp_bias"):
        raise CheckpointError(
            "Llama checkpoints with mlp_bias=true are not supported; use one without biases in the MLP."
        )
    bias = bool(raw.get("attention_bias"))
    return {"attention_bias": bias, "attention_output_bias": bias}


def _mistral(raw: dict[str, Any]) -> dict[str, Any]:
    return {"sliding_window": raw.get("sliding_window")}


def _mixed_windows(raw: dict[str, Any]) -> dict[str, Any]:
    """Qwen2 and Qwen3: some layers see a window, some everything."""
    if not raw.get("use_sliding_window"):
        return {}
    layers = range(raw["num_hidden_layers"])
    types = raw.get("layer_types") or [
        "sliding_attention" if i >= raw.get("max_window_layers", 28) else "full_attention" for i in layers
    ]
    full = [i for i in layers if types[i] == "full_attention"]
    return {"sliding_window": raw.get("sliding_window"), "full_attention_layers": full}


def _qwen2(raw: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": True} | _mixed_windows(raw)


def _qwen3(raw: dict[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias"))
    return {"attention_bias": bias, "attention_output_bias": bias, "qk_norm": "head"} | _mixed_windows(raw)


def _topk(count: int, width: int, k: int, renormalize: bool) -> dict[str, Any]:
    return {
        "num_experts": count, "expert_dim": width, "max_experts": k, "routing_strategy": "topk",
        "router_score": "softmax", "router_renormalize": renormalize,
    }  # fmt: skip


def _mixtral(raw: dict[str, Any]) -> dict[str, Any]:
    count = raw.get("num_local_experts", raw.get("num_experts", 8))
    return _mistral(raw) | _topk(count, raw["intermediate_size"], raw["num_experts_per_tok"], True)


def _qwen3_moe(raw: dict[str, Any]) -> dict[str, Any]:
    count = raw.get("num_experts", raw.get("num_local_experts", 128))
    step, skipped = raw.get("decoder_sparse_step", 1), set(raw.get("mlp_only_layers") or ())
    layers = range(raw["num_hidden_layers"])
    dense = [i for i in layers if i in skipped or (i + 1) % step]
    renormalize = bool(raw.get("norm_topk_prob"))
    experts = _topk(count, raw["moe_intermediate_size"], raw["num_experts_per_tok"], renormalize)
    window = {"sliding_window": raw.get("sliding_window")} if raw.get("use_sliding_window") else {}
    return _qwen3(raw | {"use_sliding_window": False}) | experts | window | {"dense_layers": dense}


def _olmoe(raw: dict[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias"))
    experts = _topk(
        raw["num_experts"], raw["intermediate_size"], raw["num_experts_per_tok"], bool(raw.get("norm_topk_prob"))
    )
    return experts | {
        "attention_bias": bias, "attention_output_bias": bias, "qk_norm": "width", "clip_qkv": raw.get("clip_qkv"),
    }  # fmt: skip


# What a Hugging Face model type means in our fields, beyond those that both name alike.
FAMILIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}


def convert_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Return `ModelConfig` fields for the content of a `config.json`.

    Raises:
        CheckpointError: the family or one of its features is not supported.
    """
    family = str(raw.get("model_type", ""))
    if family == OWN_TYPE:
        dropped = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype"}
        return {key: value for key, value in raw.items() if key not in dropped and not key.startswith("_")}
    if family not in FAMILIES:
        raise CheckpointError(f"Models of type {family!r} are not supported; {nearest(family, FAMILIES)}.")
    if raw.get("quantization_config"):
        raise CheckpointError("The checkpoint is quantised; use the unquantised folder of the same model.")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act={raw['hidden_act']!r} is not supported; only models with 'silu' load.")
    common = {key: raw[key] for key in _COMMON_FIELDS if raw.get(key) is not None}
    return common | FAMILIES[family](raw)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the model in `folder`, memory-mapped; raise `CheckpointError` if a file is damaged."""
    for name, _, tensor in each_tensor(weight_files(folder)):
        yield name, tensor


def convert_tensors(tensors: Iterator[tuple[str, Tensor]], config: dict[str, Any]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors under our names.

    Per-expert matrices are stacked into `gate_up_proj` `[E, 2F, D]` and `down_proj` `[E, D, F]`. Where a dense
    checkpoint is loaded into a config with experts, its feed-forward networks become the shared experts.
    """
    dense: set[int] = set(config.get("dense_layers") or ())
    renamed = {our_name(name): tensor for name, tensor in tensors}
    stacked = _stack_experts(renamed)
    if config.get("num_experts") and not any(
        ".experts." in name or name.startswith("expert_pools.") for name in stacked
    ):
        return {_as_shared_expert(name, dense): tensor for name, tensor in stacked.items()}
    return stacked


def restore_names(tensors: Iterator[tuple[str, Tensor]], changed: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return a checkpoint's tensors under its own names and in its own dtypes with the values of `changed`.

    `changed` has our names; a value that is the checkpoint's own, rounded to another dtype, counts as unchanged. None
    where a name has no single tensor there (experts that were stacked).
    """
    found, left = {}, set(changed)
    for name, tensor in tensors:
        ours = our_name(name)
        left.discard(ours)
        value = changed.get(ours, tensor).detach().cpu()
        same = torch.equal(tensor.to(value.dtype), value)
        found[name] = (tensor if same else value.to(tensor.dtype)).contiguous()
    return None if left else found


def our_name(name: str) -> str:
    """Return our name of a tensor that Hugging Face calls `name`."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def _as_shared_expert(name: str, dense_layers: set[int]) -> str:
    match = re.match(r"^layers\.(\d+)\.feed_forward\.(gate|up|down)_proj\.weight$", name)
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
            gate_up = [torch.cat((matrices[i, "gate_proj"], matrices[i, "up_proj"])) for i in range(count)]
            down = [matrices[i, "down_proj"] for i in range(count)]
        except KeyError as error:
            raise CheckpointError(
                f"The checkpoint lacks a matrix of {prefix} {error.args[0]}; fetch it again."
            ) from None
        output[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
        output[f"{prefix}.down_proj"] = torch.stack(down)
    return output
