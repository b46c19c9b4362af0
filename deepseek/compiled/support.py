"""Which models the compiled step computes: rules for every field of the config that it honours."""

from typing import Any

from deepseek.kernels.int8 import GROUP
from deepseek.kernels.numba import openmp
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

# Angles are computed once for each position; "dynamic" ones, which `transformers` also has, depend
# on the length.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def _has_fixed_angles(rope_parameters: dict[str, Any] | None) -> bool:
    return (rope_parameters or {}).get("rope_type", "default") in ROPE_TYPES


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
            "max_position_embeddings",
            "num_attention_heads",
            "num_hidden_layers",
            "num_key_value_heads",
            "rms_norm_eps",
            "tie_word_embeddings",
            "train_len",  # of "dpe"
            "vocab_size",
        )
    )
    | {
        "attention": one_of("full"),
        "clip_qkv": one_of(None),
        "head_dim": FieldRule(lambda width: width % GROUP == 0, f"a multiple of {GROUP}"),
        "hidden_act": one_of("silu"),
        "num_experts": one_of(0),
        "positional_encoding": one_of("rope"),
        "qk_norm": one_of("none", "head"),
        "rope_parameters": FieldRule(
            _has_fixed_angles, f"of rope_type {' or '.join(map(repr, ROPE_TYPES))}"
        ),
        "sliding_window": FieldRule(
            lambda window: window is None or window >= 1, "None or at least 1"
        ),  # 0 codes None
    }
)
"""Field -> what the step computes of it. To honour a new field, add it here, with a test that it
changes the logits.
"""


def unsupported_reason(model: DeepSeekModel) -> str | None:
    """Return a sentence on why the compiled runner does not compute `model`; None if it does."""
    reason = unsupported(model.config, RULES)
    if reason is not None:
        return f"The compiled runner does not compute models with {reason}."
    if model.device.type != "cpu":
        return f"The compiled runner computes on the CPU, and the model is on {model.device.type}."
    if openmp.runtime() is None:
        return "The compiled runner cannot call the OpenMP runtime of this build of torch."
    return None
