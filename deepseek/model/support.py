"""Which models a piece of code computes that computes only some: rules by config field, closed by
default.

The compiled step, the exported graph and the stock converter each list every field of `ModelConfig`
that they honour, with the values that they can compute. A field that is not listed, such as one
that was added after the list was made, is not computed, whatever its value: so no new field is ever
ignored in silence.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from deepseek.model.config import FOREIGN_KEYS, ModelConfig


@dataclass(frozen=True)
class FieldRule:
    """The values of a field that are computed.

    Attributes:
        allows: whether a value is.
        needed: what a value must be, for a message.
    """

    allows: Callable[[Any], bool]
    needed: str


ANY = FieldRule(lambda _: True, "anything")
"""Every value is honoured, or the field changes no logits of the models that the other rules let
through.
"""


def one_of(*values: Any) -> FieldRule:
    """Return the rule of a field that has to be one of `values`."""
    return FieldRule(lambda value: value in values, " or ".join(map(repr, values)))


def any_of(names: Iterable[str]) -> dict[str, FieldRule]:
    """Return the rule `ANY` for each of the fields."""
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
"""Fields that no logits depend on: what Hugging Face notes, what training reads, and what
generation stops at.
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
"""Fields that are read with `attention` = "lsh" only."""

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
"""Fields that are read with `num_experts` > 0 only."""


def config_fields(config: ModelConfig) -> list[str]:
    """Return the names of all fields of a config, those that were only set on the object included.

    What Hugging Face itself sets there, such as `model_type` where a config is made of the
    dictionary of another, is no field.
    """
    declared = {field.name for field in fields(config)}
    assigned = {name for name in vars(config) if not name.startswith("_")}
    return sorted(declared | (assigned - FOREIGN_KEYS))


def unsupported(config: ModelConfig, rules: Mapping[str, FieldRule]) -> str | None:
    """Return what is not computed of `config`, as "field=value (what is needed)"; None if all of it
    is.
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
