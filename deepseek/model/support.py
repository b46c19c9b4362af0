"""Support by allow-list: which model configs a restricted implementation can compute.

The compiled step, the exported graph and the stock converter each list every `ModelConfig` field
that they honour, with the values that they support. A config with any other field, such as one
added after the list was written, is unsupported. A new field is thus never ignored silently.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from deepseek.model.config import FOREIGN_KEYS, ModelConfig


@dataclass(frozen=True)
class FieldRule:
    """The supported values of a field.

    Attributes:
        allows: returns whether a value is supported.
        needed: the supported values in words, for a message.
    """

    allows: Callable[[Any], bool]
    needed: str


ANY = FieldRule(lambda _: True, "anything")
"""Every value is supported, or no model that the other rules admit depends on the field."""


def one_of(*values: Any) -> FieldRule:
    """Return the rule that a field is one of `values`."""
    return FieldRule(lambda value: value in values, " or ".join(map(repr, values)))


def any_of(names: Iterable[str]) -> dict[str, FieldRule]:
    """Return the rule `ANY` for each field name."""
    return dict.fromkeys(names, ANY)


NOT_COMPUTED_WITH = (
    "architectures",
    "balance_rate",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
)
"""Fields that no logits depend on: Hugging Face's metadata, and fields that only training and
generation read.
"""

LSH_FIELDS = (
    "lsh_bucket_window",
    "lsh_exact_layers",
    "lsh_far_field",
    "lsh_local_window",
    "lsh_num_buckets",
    "lsh_probes",
    "lsh_rounds",
    "lsh_sinks",
)
"""Fields that are read only if `attention` is "lsh"."""

MIXTURE_FIELDS = (
    "candidate_experts",
    "dense_layers",
    "expert_dim",
    "expert_sharing",
    "max_expert_groups",
    "max_experts",
    "min_experts",
    "num_expert_groups",
    "num_shared_experts",
    "router_renormalize",
    "router_scale",
    "router_score",
    "router_temperature",
    "routing_strategy",
    "routing_threshold",
    "shared_expert_dim",
    "target_experts",
)
"""Fields that are read only if `num_experts` > 0."""


def config_fields(config: ModelConfig) -> list[str]:
    """Return the names of all fields of a config, including attributes set on the instance.

    Attributes that Hugging Face itself sets, such as `model_type` in a config that is created from
    another's dictionary, are not fields.
    """
    declared = {field.name for field in fields(config)}
    assigned = {name for name in vars(config) if not name.startswith("_")}
    return sorted(declared | (assigned - FOREIGN_KEYS))


def unsupported(config: ModelConfig, rules: Mapping[str, FieldRule]) -> str | None:
    """Return the unsupported fields of `config` as "field=value (reason)", or None.

    Args:
        config: the config to check.
        rules: field -> its supported values; a field without a rule is unsupported.
    """
    reasons = []
    for name in config_fields(config):
        value = getattr(config, name)
        rule = rules.get(name)
        if rule is None:
            reasons.append(f"{name}={value!r} (an unknown field)")
        elif not rule.allows(value):
            reasons.append(f"{name}={value!r} (must be {rule.needed})")
    return ", ".join(reasons) or None
