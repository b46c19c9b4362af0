"""Type and range of each field of `ModelConfig`, as data; `config.py` adds rules between fields."""

from functools import partial
from typing import Any

import torch

from deepseek.checks import (
    MAX_SIZE,
    Check,
    choice,
    flag,
    mapping,
    number,
    optional,
    sequence,
    whole,
)
from deepseek.errors import ConfigError, shown
from deepseek.registry import nearest

CHOICES: dict[str, tuple[str, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh", "silu"),
    "positional_encoding": ("alibi", "dpe", "learned", "none", "rope"),
    "routing_strategy": ("dense", "dynamic", "topk"),
    "router_score": ("sigmoid", "softmax"),
    "qk_norm": ("head", "none", "width"),
}

TEMPERATURE = partial(number, least=1e-3, most=1e3)
"""Temperatures whose logits neither overflow nor lose all differences in fp32."""

BALANCE_RATE = partial(number, least=0, most=1)

MAX_LAYERS = 4096
"""Maximum number of layers; each is built, on the meta device too, before weights are read."""

size = partial(whole, least=1, most=MAX_SIZE)
count = partial(whole, least=0, most=MAX_SIZE)


def dtype(name: str, value: Any) -> Any:
    """Return a floating-point dtype or the name of one; raise `ConfigError` if it is neither."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        valid = ("bfloat16", "float16", "float32")
        raise ConfigError(f"{name}={shown(value)} is unknown; {nearest(shown(value), valid)}.")
    return value


FIELDS: dict[str, Check] = {
    **{name: partial(choice, valid=valid) for name, valid in CHOICES.items()},
    "vocab_size": size,
    "hidden_size": size,
    "intermediate_size": size,
    "num_hidden_layers": partial(whole, least=1, most=MAX_LAYERS),
    "num_attention_heads": size,
    "num_key_value_heads": optional(size),
    "head_dim": optional(size),
    "max_position_embeddings": size,
    "initializer_range": partial(number, least=0),
    "rms_norm_eps": partial(number, above=0),
    "use_cache": flag,
    "tie_word_embeddings": flag,
    "post_norms": flag,
    "unit_offset_norms": flag,
    "scale_embeddings": flag,
    "query_pre_attn_scalar": optional(partial(number, above=0)),
    "local_rope_theta": optional(partial(number, above=1)),
    "attention_bias": flag,
    "attention_output_bias": flag,
    "clip_qkv": optional(partial(number, above=0)),
    "attn_logit_softcapping": optional(partial(number, above=0)),
    "final_logit_softcapping": optional(partial(number, above=0)),
    "sliding_window": optional(size),
    "rope_parameters": optional(mapping),
    "train_len": optional(size),
    "num_experts": count,
    "expert_dim": count,
    "num_shared_experts": count,
    "shared_expert_dim": optional(count),
    "routing_threshold": partial(number, above=0, most=1),
    "min_experts": size,
    "max_experts": optional(size),
    "candidate_experts": size,
    "expert_sharing": size,
    "target_experts": optional(partial(number, least=1)),
    "router_temperature": TEMPERATURE,
    "router_renormalize": flag,
    "router_scale": partial(number, above=0),
    "num_expert_groups": size,
    "max_expert_groups": size,
    "balance_rate": BALANCE_RATE,
    "dtype": optional(dtype),
}

LAYERS = ("full_attention_layers", "dense_layers", "lsh_exact_layers")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def check_indices(config: Any) -> None:
    """Check the fields that hold layer indices and token ids against the sizes of the config.

    Args:
        config: a `ModelConfig` whose `FIELDS` are checked already.

    Raises:
        ConfigError: a layer does not exist, or an id is outside the vocabulary.
    """
    one_layer = partial(whole, least=0, most=config.num_hidden_layers - 1)
    for name in LAYERS:
        value = getattr(config, name)
        if value is not None:
            setattr(config, name, sequence(name, value, one_layer, "layer indices"))
    one_id = partial(whole, least=0, most=config.vocab_size - 1)
    for name in TOKENS:
        value = getattr(config, name)
        if name == "eos_token_id" and isinstance(value, list | tuple):
            config.eos_token_id = sequence(name, value, one_id, "token ids")
        elif value is not None:
            setattr(config, name, one_id(name, value))
