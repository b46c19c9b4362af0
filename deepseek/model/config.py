"""`ModelConfig`: the architecture of a model, as a Hugging Face config."""

from collections.abc import Mapping
from dataclasses import fields
from inspect import Parameter, Signature
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from deepseek import checks
from deepseek.errors import ConfigError, shown
from deepseek.model.attention_fields import AttentionFields
from deepseek.model.contradictions import refuse_contradictions
from deepseek.model.field_checks import FIELDS, check_indices
from deepseek.model.presets import PRESETS
from deepseek.registry import nearest, pick

# Keys that Hugging Face itself writes into a config or passes along with it. They are left to it.
FOREIGN_KEYS = {
    "attn_implementation",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
}

OLDER_ROTARY = {"rope_scaling", "rope_theta"}
"""Older names of parts of `rope_parameters`."""

ROTARY_FIELDS = {"rope_parameters", *OLDER_ROTARY}


class ModelConfig(AttentionFields, PreTrainedConfig):
    """Architecture of a `DeepSeekModel`. Fields that Hugging Face also has keep its names.

    A field that is neither passed nor assigned later keeps its default.
    `from_pretrained(name, config=...)` takes it from the checkpoint instead. An unknown or
    contradictory value raises `ConfigError`, which names the field and the nearest valid one;
    assigned fields must not contradict each other once a model is built.

    Backbone:
        vocab_size: number of token ids V.
        hidden_size: width D of the residual stream.
        intermediate_size: width of the dense feed-forward networks.
        num_hidden_layers: number of layers.
        num_attention_heads: number H of query heads.
        num_key_value_heads: number G of key/value heads, which must divide H (default: H).
        head_dim: width K of one attention head (default: `hidden_size // num_attention_heads`).
        hidden_act: activation of the dense feed-forward networks, "silu" (SwiGLU) or
            "gelu_pytorch_tanh" (GeGLU). Mixtures of experts have "silu".
        initializer_range: standard deviation of initial weights.
        rms_norm_eps: epsilon of the RMS norms.
        post_norms: whether the outputs of attention and feed-forward network are normed as well,
            before they are added to the residual stream (Gemma 3).
        unit_offset_norms: whether norms scale by 1 + weight (Gemma).
        scale_embeddings: whether embeddings are multiplied by the root of `hidden_size` (Gemma).
        use_cache: whether a forward pass outside training creates a KV cache.
        tie_word_embeddings: whether the LM head shares the weights of the embeddings.
        pad_token_id, bos_token_id, eos_token_id: ids of special tokens, None if there are none.
        qk_norm: RMS norm on queries and keys: "none", per "head" (Qwen3) or over the full "width"
            (OLMoE).
        clip_qkv: clamp queries, keys and values to [-clip_qkv, clip_qkv] (OLMoE); None: no clamp.
        attn_logit_softcapping, final_logit_softcapping: attention scores, and logits, z are capped
            to c * tanh(z / c) (Gemma 2, arXiv:2408.00118, section 2); None: no cap. Scores are
            capped in full attention without a score bias ("dpe", "alibi").
        attention_bias, attention_output_bias: whether the query, key and value projections, and the
            output projection, have biases.
        query_pre_attn_scalar: scores are divided by its root (Gemma); None: `head_dim`.
        sliding_window: number of tokens, itself included, that a token attends to; None: all. The
            window counts cache slots, so right padding before continued tokens counts.
        full_attention_layers: layers that ignore `sliding_window` (Qwen2 and Qwen3 mix both kinds).
        attention: kind of attention, "full" or another name in `model/attention/__init__.py`.
            Fields of one kind only are in `model/attention_fields.py`.
        max_position_embeddings: longest context in tokens; `max_len` is an alias.
        positional_encoding: "rope", "dpe" (rope plus a learned score bias, see
            `model/positions/dynamic.py`), "alibi", "learned" (one vector per position) or "none".
        rope_parameters: parameters of "rope" and "dpe" in Hugging Face's form: `rope_theta`,
            `rope_type` ("yarn" and others). `rope_theta` and `rope_scaling`, the older names of its
            parts, are accepted as well.
        local_rope_theta: rotary base of layers with a sliding window (Gemma 3), whose angles are
            not scaled; None: that of `rope_parameters`, scaling included.
        train_len: tokens per row that "dpe" is trained on (default: the longest context).
    Mixture of experts (`num_experts` = 0 makes a dense model):
        num_experts, expert_dim: routed experts per pool, and width F of each.
        num_shared_experts, shared_expert_dim: number of always-active experts, and their total
            width (default: `num_shared_experts * expert_dim`).
        routing_strategy: "dynamic" (as many experts as the cumulative threshold needs), "topk" or
            "dense" (all).
        routing_threshold: cumulative weight at which dynamic routing stops adding experts.
        min_experts, max_experts: bounds on the number of experts per token with dynamic routing;
            `max_experts` (default: 5, or `num_experts` if there are fewer) is the k of "topk".
        candidate_experts: number of experts that the softmax of dynamic routing runs over.
        expert_sharing: number of adjacent layers that share one pool of routed experts (1: every
            layer owns its pool).
        target_experts: mean number of experts per token that temperature control aims at with
            dynamic routing; the others do not read it (None: no control).
        router_temperature: initial value of that temperature.
        router_score: "softmax" over all experts or "sigmoid" of each ("topk").
        router_renormalize, router_scale: whether the weights of a token are normalised to sum to 1,
            and a factor on them ("topk").
        num_expert_groups, max_expert_groups: group-limited top-k (DeepSeek-V3, arXiv:2412.19437).
        balance_rate: step size of the loss-free balance bias (arXiv:2408.15664).
        dense_layers: layers that keep a dense feed-forward network.
    """

    model_type = "deepseek_dmoe"
    attribute_map: ClassVar[dict[str, str]] = {
        "max_len": "max_position_embeddings",
        "num_experts_per_tok": "max_experts",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    vocab_size: int = 49152
    hidden_size: int = 512
    intermediate_size: int = 1536
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = None  # type: ignore[assignment]  # None: set in __post_init__
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    post_norms: bool = False
    unit_offset_norms: bool = False
    scale_embeddings: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    attention: str = "full"
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: str = "none"
    clip_qkv: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    query_pre_attn_scalar: float | None = None
    sliding_window: int | None = None
    full_attention_layers: list[int] | None = None

    positional_encoding: str = "rope"
    rope_parameters: dict[str, Any] | None = None
    local_rope_theta: float | None = None
    train_len: int | None = None

    num_experts: int = 0
    expert_dim: int = 0
    num_shared_experts: int = 0
    shared_expert_dim: int | None = None
    routing_strategy: str = "dynamic"
    routing_threshold: float = 0.7
    min_experts: int = 1
    max_experts: int = None  # type: ignore[assignment]
    candidate_experts: int = 8
    expert_sharing: int = 1
    target_experts: float | None = None
    router_temperature: float = 1.0
    router_score: str = "softmax"
    router_renormalize: bool = True
    router_scale: float = 1.0
    num_expert_groups: int = 1
    max_expert_groups: int = 1
    balance_rate: float = 1e-2
    dense_layers: list[int] | None = None

    def __new__(cls, *_: Any, **kwargs: Any) -> "ModelConfig":
        config = super().__new__(cls)
        # Remember which fields the caller set: `merged_into` must tell them from defaults.
        scaling = kwargs.get("rope_scaling")
        inside = {"rope_theta"} & set(scaling if isinstance(scaling, Mapping) else ())
        config.__dict__["_given"] = tuple(sorted(kwargs.keys() | inside))
        return config

    def __post_init__(self, **kwargs: Any) -> None:
        for key in kwargs:
            if (
                key not in FOREIGN_KEYS
                and key not in self.attribute_map
                and not key.startswith("_")
            ):
                raise ConfigError(
                    f"ModelConfig has no field {key!r}; {nearest(key, field_names())}."
                )
        for alias in self.attribute_map.keys() & kwargs.keys():
            self._set_by_alias(alias, kwargs.pop(alias))
        checks.apply(FIELDS, self)
        if "rope_scaling" in kwargs:  # copied, because Hugging Face adds the defaults to it
            scaling = checks.optional(checks.mapping)("rope_scaling", kwargs["rope_scaling"])
            kwargs["rope_scaling"] = scaling
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.shared_expert_dim is None:
            self.shared_expert_dim = self.num_shared_experts * self.expert_dim
        if self.max_experts is None:
            self.max_experts = min(5, self.num_experts or 5)
        check_indices(self)
        try:
            super().__post_init__(**kwargs)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            # Fields of Hugging Face that we do not read have no checks of their own.
            raise ConfigError(
                f"A field that Hugging Face reads is invalid ({shown(error)}); correct it or "
                "leave it out."
            ) from None
        refuse_contradictions(self)
        self._complete = True

    def __setattr__(self, key: str, value: Any) -> None:
        """Set a field. Once the config is complete, its check applies and it counts as given."""
        if "_complete" not in self.__dict__:
            super().__setattr__(key, value)
            return
        name = self.attribute_map.get(key, key)
        if name in ROTARY_FIELDS:
            names = self._set_rotary(name, value)
        else:
            names = {name} & field_names()
            super().__setattr__(name, FIELDS[name](name, value) if name in FIELDS else value)
        self.__dict__["_given"] = tuple(sorted(names.union(self._given)))

    def _set_rotary(self, name: str, value: Any) -> set[str]:
        """Set `rope_parameters`, or a part of them by its older name.

        Returns:
            The names of what was set: a base inside `rope_scaling` is one of its own.
        """
        names = {name}
        ours = self.rope_parameters or {}
        if name == "rope_theta":
            value = {**ours, name: value}
        parts = checks.optional(checks.mapping)(name, value) or {}
        if name == "rope_scaling":
            names |= OLDER_ROTARY & parts.keys()
            parts = {key: ours[key] for key in OLDER_ROTARY & ours.keys()} | parts
        context = self.max_position_embeddings
        complete = type(self)(rope_parameters=parts, max_position_embeddings=context)
        super().__setattr__("rope_parameters", complete.rope_parameters)
        return names

    def _set_by_alias(self, alias: str, value: Any) -> None:
        """Set a field by its other name.

        Raises:
            ConfigError: the field is given too, with another value.
        """
        name = self.attribute_map[alias]
        if name in self._given and getattr(self, name) != value:
            raise ConfigError(
                f"{alias}={value!r} and {name}={getattr(self, name)!r} are the same field; give "
                "one."
            )
        setattr(self, name, value)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """Return a named preset with some fields changed.

        Args:
            name: `deepseek-nano`, `-29m`, `-1b`, `-8b` or `-175b`.
            **changes: fields that replace those of the preset.

        Raises:
            ConfigError: the preset or a field is unknown, or the fields contradict each other.
        """
        return cls(**(pick(PRESETS, name, "preset") | changes))

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were passed or assigned, also by an alias, with their values."""
        names = [name for name in self._given if name in field_names()]
        return {self.attribute_map.get(name, name): getattr(self, name) for name in names}

    def merged_into(self, checkpoint: dict[str, Any]) -> "ModelConfig":
        """Return a checkpoint's config, overridden by the fields that were set on this one.

        Args:
            checkpoint: the `ModelConfig` fields of the checkpoint.

        Raises:
            ConfigError: a field that was set contradicts the shape of the checkpoint's weights.
        """
        for name in sorted(WEIGHT_FIELDS & self.given.keys() & checkpoint.keys()):
            if self.given[name] != checkpoint[name]:
                raise ConfigError(
                    f"{name}={self.given[name]!r} contradicts the checkpoint, whose weights have "
                    f"{name}={checkpoint[name]!r}; leave {name} out."
                )
        if not checkpoint.get("num_experts"):  # a dense model states bounds for no experts
            checkpoint = {key: value for key, value in checkpoint.items() if key != "max_experts"}
        return type(self)(**(checkpoint | self.given | self._rotary_over(checkpoint)))

    def _rotary_over(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return the `rope_parameters` of a checkpoint with the parts that were set on this config
        by their older names, `rope_theta` and `rope_scaling`; {} if neither was set.
        """
        older = OLDER_ROTARY.intersection(self._given)
        if not older or "rope_parameters" in self._given:
            return {}
        ours = self.rope_parameters or {}
        theirs = checkpoint.get("rope_parameters") or {}
        base = ours if "rope_theta" in older else theirs
        merged = dict(ours if "rope_scaling" in older else theirs)
        merged.pop("rope_theta", None)
        return {
            "rope_parameters": {key: base[key] for key in {"rope_theta"} & base.keys()} | merged
        }

    def is_sparse(self, layer_idx: int) -> bool:
        """Return whether the feed-forward network of layer `layer_idx` is a mixture of experts."""
        return self.num_experts > 0 and layer_idx not in (self.dense_layers or ())

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        for name in ("_complete", "_given"):
            output.pop(name, None)
        return output


# Fields that determine the shape of the backbone's weights; a checkpoint fixes them.
WEIGHT_FIELDS = {
    "attention_bias",
    "attention_output_bias",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "post_norms",
    "qk_norm",
    "unit_offset_norms",
    "vocab_size",
}


def field_names() -> set[str]:
    """Return the names that `ModelConfig(...)` accepts, aliases included."""
    return {field.name for field in fields(ModelConfig)} | set(ModelConfig.attribute_map)


# `__new__` takes anything; editors complete the names of the fields.
ModelConfig.__signature__ = Signature(  # type: ignore[attr-defined]
    [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(ModelConfig)
    ]
)
