"""Which models the compiled step supports: a rule for every config field that it honours."""

from typing import Any

from torch import nn

from deepseek.compiled.hashes import unknown_hash
from deepseek.kernels.numba import openmp
from deepseek.model.config import ModelConfig
from deepseek.model.embedding import ScaledEmbedding
from deepseek.model.stored import StoredEmbedding, StoredLinear
from deepseek.model.support import (
    LSH_FIELDS,
    MIXTURE_FIELDS,
    NOT_COMPUTED_WITH,
    FieldRule,
    any_of,
    one_of,
    unsupported,
)
from deepseek.model.transformer import DeepSeekModel

# The angles of each position are precomputed. This excludes the "dynamic" type of `transformers`,
# whose angles depend on the length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Layers whose output is determined by their weight and bias, which is all that the step reads.
LAYERS = (nn.Linear, nn.Embedding, ScaledEmbedding, StoredLinear, StoredEmbedding)
KNOWN_PACKAGES = ("deepseek.", "torch.nn.modules.")


def _has_fixed_angles(rope_parameters: dict[str, Any] | None) -> bool:
    """Whether the rotary angles depend on the position alone."""
    return (rope_parameters or {}).get("rope_type", "default") in ROPE_TYPES


# The kernel encodes None as 0.
RULES = (
    any_of(NOT_COMPUTED_WITH)
    | any_of(LSH_FIELDS)
    | any_of(MIXTURE_FIELDS)
    | any_of(
        (
            "attention_bias",
            "attention_output_bias",
            "full_attention_layers",
            "hidden_size",
            "intermediate_size",
            "local_rope_theta",
            "max_position_embeddings",
            "num_attention_heads",
            "num_experts",
            "num_hidden_layers",
            "num_key_value_heads",
            "post_norms",
            "query_pre_attn_scalar",
            "rms_norm_eps",
            "scale_embeddings",
            "tie_word_embeddings",
            "train_len",
            "unit_offset_norms",
            "vocab_size",
        )
    )
    | {
        "attention": one_of("full", "lsh"),
        **dict.fromkeys(
            ("attn_logit_softcapping", "clip_qkv", "final_logit_softcapping"),
            FieldRule(lambda limit: limit is None or limit > 0, "None or above 0"),
        ),
        "head_dim": FieldRule(lambda width: 32 <= width <= 256, "between 32 and 256"),
        "hidden_act": one_of("gelu_pytorch_tanh", "silu"),
        # Pages hold the buckets of keys in 16 bits.
        "lsh_num_buckets": FieldRule(lambda count: count <= 1 << 16, "at most 65536"),
        "positional_encoding": one_of("alibi", "dpe", "none", "rope"),
        "qk_norm": one_of("none", "head", "width"),
        "router_score": one_of("sigmoid", "softmax"),
        "routing_strategy": one_of("dense", "dynamic", "topk"),
        "rope_parameters": FieldRule(
            _has_fixed_angles, f"of rope_type {' or '.join(map(repr, ROPE_TYPES))}"
        ),
        "sliding_window": FieldRule(
            lambda window: window is None or window >= 1, "None or at least 1"
        ),
    }
)
"""Field -> the values that the step supports. To honour a new field, add it here, with a test that
it changes the logits.
"""


def unsupported_reason(model: DeepSeekModel) -> str | None:
    """Return one sentence on why the compiled runner does not support `model`; None if it does.

    Args:
        model: the model to check.
    """
    if model.device.type != "cpu":
        return f"The compiled runner computes on the CPU, and the model is on {model.device.type}."
    hash_kind = unknown_hash(model)
    if hash_kind is not None:
        return f"The compiled runner does not compute hashes of the kind {hash_kind}."
    layer = _foreign_layer(model)
    return unsupported_config_reason(model.config) or (
        None if layer is None else f"The compiled runner does not compute layers such as {layer}."
    )


def _foreign_layer(model: DeepSeekModel) -> str | None:
    """Return class and name of a layer that the step does not know and whose output may depend on
    more than its weight and bias, such as a PEFT adapter; None if there is none.
    """
    for name, module in model.named_modules():
        kind = type(module)
        known = kind.__module__.startswith(KNOWN_PACKAGES)
        if isinstance(module, nn.Linear | nn.Embedding):
            known = kind in LAYERS
        if not known and module is not model:
            return f"the {kind.__name__} of {kind.__module__} at {name}"
    return None


def unsupported_config_reason(config: ModelConfig) -> str | None:
    """Return one sentence on why the compiled runner does not support the models of a config; None
    if it does.
    """
    reason = unsupported(config, RULES)
    if reason is not None:
        return f"The compiled runner does not compute models with {reason}."
    if openmp.runtime() is None:
        return "The compiled runner cannot call the OpenMP runtime of this build of torch."
    return None
