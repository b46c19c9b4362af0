"""Model and generation config of a GGUF file.

The names of most fields come from the tables of `transformers`. This module adds what llama.cpp's
converter writes and those tables lack: head widths, expert widths and scaled rotary positions.
"""

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

from deepseek.checkpoint.gguf.reader import GgufFile
from deepseek.errors import CheckpointError, shown

FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "starcoder2": "starcoder2",
}
"""Architecture in a GGUF file -> key in the tables of `transformers`, if this module writes its
config. `transformers` itself reads the other architectures (`convert.convert_gguf`).
"""

MODEL_TYPES = {"gemma3": "gemma3_text"}
"""Keys of the tables that are not the `model_type` of a config."""

MORE_FIELDS = {
    "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Metadata key -> config field, beside those in the tables of `transformers`."""

SCALING = {
    "attn_factor": 1,
    "yarn_attn_factor": 1,
    "yarn_beta_fast": 32,
    "yarn_beta_slow": 1,
    "yarn_ext_factor": 1,
    "yarn_log_multiplier": 0,
}
"""Key below "rope.scaling" -> the only value that is accepted. llama.cpp computes with these keys,
but the config has no field for some and gives others another meaning.
"""

LLAMA3_LIMITS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Rotary parameters that all models from Llama 3.1 on share; a GGUF file does not state them."""

TOKEN_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}
"""Name in a config -> name in GGUF metadata."""

LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Number of layers of the one size of each Gemma whose queries are scaled by the model's width over
its heads, not by the head's width; llama.cpp recognises it by this number, too.
"""


def model_config(file: GgufFile) -> PretrainedConfig:
    """Return the config of the model in a GGUF file.

    Args:
        file: a file whose architecture is in `FAMILIES`.

    Raises:
        CheckpointError: metadata is missing, or its values do not make a model.
    """
    family = FAMILIES[file.architecture]
    config_class = CONFIG_MAPPING[MODEL_TYPES.get(family, family)]
    field_names = {field.name for field in fields(config_class)}
    values: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(family) or {})
    table: dict[str, str | None] = GGUF_CONFIG_MAPPING[family]  # type: ignore[assignment]
    for key, field in table.items():
        if field is not None and f"{file.architecture}.{key}" in file.facts:
            values[field] = _shortest(file.facts[f"{file.architecture}.{key}"])
    for key, field in MORE_FIELDS.items():
        if field in field_names and f"{file.architecture}.{key}" in file.facts:
            values[field] = file.facts[f"{file.architecture}.{key}"]
    for name, key in TOKEN_IDS.items():
        values[f"{name}_token_id"] = file.token_id(key)
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} has no token embeddings; it holds no language model.")
    values |= {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_rope(file),
        **_window(file),
    }
    check_layers(file)
    if family in LARGEST_GEMMA and "head_dim" in values:
        values["query_pre_attn_scalar"] = values["head_dim"]
        if values.get("num_hidden_layers") == LARGEST_GEMMA[family]:
            values["query_pre_attn_scalar"] = values["hidden_size"] // values["num_attention_heads"]
    try:
        config = config_class(**values)
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
    except Exception as error:  # config classes check their fields with errors of many types
        raise describes_no_model(file, family, error) from None
    _check_rotation(file, width)
    return config


def _window(file: GgufFile) -> dict[str, Any]:
    """Return the sliding window of Phi-3, which the tables of `transformers` lack; 0 means none.

    llama.cpp ignores it, and so computes another model beyond the window.
    """
    if file.architecture != "phi3":
        return {}
    return {"sliding_window": file.facts.get("phi3.attention.sliding_window") or None}


def describes_no_model(file: GgufFile, family: str, error: Exception) -> CheckpointError:
    """Return the error of metadata that a class of `transformers` refuses."""
    reason = " ".join(str(error).split())
    return CheckpointError(
        f"{file.path} describes no {family} model ({reason}); convert the original model to GGUF "
        "again."
    )


def check_layers(file: GgufFile) -> None:
    """Raise `CheckpointError` if the file states more layers than it has tensors.

    A model is built from the stated number, also on the meta device, before its tensors are read,
    and `transformers` takes time in proportion to its cube.
    """
    layers = file.facts.get(f"{file.architecture}.block_count", 0)
    if not isinstance(layers, int) or not 0 <= layers <= len(file.tensors):
        raise CheckpointError(
            f"{file.path} states {shown(layers)} layers and has {len(file.tensors)} tensors; "
            "convert the original model to GGUF again."
        )


def _check_rotation(file: GgufFile, width: int) -> None:
    """Raise `CheckpointError` if the file rotates heads of this width in a way that no config can
    state, because the folder would hold another model.
    """
    width = file.facts.get(f"{file.architecture}.attention.key_length", width)
    supported_values = {"rope.dimension_count": width} | {
        f"rope.scaling.{key}": value for key, value in SCALING.items()
    }
    for key, value in supported_values.items():
        stated_value = file.facts.get(f"{file.architecture}.{key}", value)
        if stated_value != value:
            raise CheckpointError(
                f"{file.path} states {key} = {shown(stated_value)}, and only {value} is read from "
                "GGUF; use the original model's folder or hub id."
            )


def generation_config(file: GgufFile) -> GenerationConfig:
    """Return the generation config of a GGUF file: its token ids.

    If turns (`eot`) or messages (`eom`) end with other tokens than documents, each of these tokens
    stops the generation.
    """
    ids = {name: file.token_id(key) for name, key in TOKEN_IDS.items()}
    stops = (ids["eos"], file.token_id("eot"), file.token_id("eom"))
    ends = [end for end in dict.fromkeys(stops) if end is not None]
    return GenerationConfig(
        bos_token_id=ids["bos"],
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=ids["pad"] if ids["pad"] is not None else ids["eos"],
    )


def _shortest(value: Any) -> Any:
    """Return a number as the original config had it: GGUF stores fp32, whose shortest decimal form
    is that number.
    """
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope(file: GgufFile) -> dict[str, Any]:
    """Return the config fields of scaled rotary positions, {} without scaling."""
    prefix = f"{file.architecture}.rope"
    local_base = file.facts.get(f"{prefix}.freq_base_swa")
    fields_ = {} if local_base is None else {"rope_local_base_freq": _shortest(local_base)}
    if f"{prefix}.freq_base" in file.facts:  # the table of StarCoder2 lacks it
        fields_["rope_theta"] = _shortest(file.facts[f"{prefix}.freq_base"])
    # llama.cpp scales linearly by a factor without a type, whose older name is "scale_linear".
    linear_factor = file.facts.get(f"{prefix}.scale_linear")
    factor = file.facts.get(f"{prefix}.scaling.factor", linear_factor)
    kind = file.facts.get(f"{prefix}.scaling.type", "linear" if factor else "none")
    if "rope_freqs.weight" in file.tensors:
        return fields_ | {"rope_scaling": _llama3_scaling(file)}
    if kind == "none" and not any(name.startswith("rope_factors_") for name in file.tensors):
        return fields_
    if kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"{file.path} scales its positions by {kind!r} factors, which are not read from GGUF; "
            "use the original model's folder or hub id."
        )
    if factor is None:
        factor = file.fact(f"{prefix}.scaling.factor")
    scaling = {"rope_type": kind, "factor": _shortest(factor)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = file.fact(
            f"{prefix}.scaling.original_context_length"
        )
    return fields_ | {"rope_scaling": scaling}


def _llama3_scaling(file: GgufFile) -> dict[str, Any]:
    """Return the scaling of Llama 3.1 and later, of which GGUF keeps one factor a frequency.

    All these models have the same limits between low and high frequencies; that is checked.
    """
    factors = file.values("rope_freqs.weight")
    scaling = {"rope_type": "llama3", "factor": float(factors.max().round()), **LLAMA3_LIMITS}
    base = file.fact(f"{file.architecture}.rope.freq_base")
    if not np.allclose(factors, llama3_factors(scaling, base, len(factors)), rtol=1e-4):
        raise CheckpointError(
            f"{file.path} scales its positions by factors that are not Llama 3's; use the original "
            "model's folder or hub id."
        )
    return scaling


def llama3_factors(scaling: dict[str, Any], base: float, count: int) -> "np.ndarray[Any, Any]":
    """Return the factors by which Llama 3 divides its `count` frequencies."""
    frequencies = 1 / base ** (torch.arange(count, dtype=torch.float64) / count)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smoothing = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smoothing) / scaling["factor"] + smoothing)).numpy()
