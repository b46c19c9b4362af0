"""The fields of `ModelConfig` that determine the sizes of a model.

It is a class of its own because `ModelConfig` loads transformers and torch, which takes seconds;
a test compares names, defaults and counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from deepseek import checks
from deepseek.model.presets import PRESETS
from deepseek.registry import pick

if TYPE_CHECKING:
    from deepseek.model.config import ModelConfig

ATTENTION_KINDS = ("exact", "flash", "lsh")
"""Kinds of attention to plan: all scores in memory; all scores in tiles; or the scores of LSH
attention's candidates, in tiles.
"""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Fields of `ModelConfig` that decide sizes; see there for their meaning."""

    vocab_size: int = 49152
    hidden_size: int = 512
    intermediate_size: int = 1536
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    attention: str = "full"
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: str = "none"
    post_norms: bool = False
    positional_encoding: str = "rope"
    num_experts: int = 0
    expert_dim: int = 0
    num_shared_experts: int = 0
    shared_expert_dim: int | None = None
    routing_strategy: str = "dynamic"
    max_experts: int = 5
    expert_sharing: int = 1
    target_experts: float | None = None
    dense_layers: tuple[int, ...] = ()
    lsh_num_buckets: int = 64
    lsh_probes: int = 4
    lsh_rounds: int = 1
    lsh_bucket_window: int = 96
    lsh_local_window: int = 128
    lsh_sinks: int = 4
    lsh_far_field: bool = False
    lsh_exact_layers: tuple[int, ...] | None = None

    @staticmethod
    def of(model: "str | ModelConfig | Architecture | Mapping[str, Any]") -> "Architecture":
        """Return the architecture of a preset, a config, or the fields of a config.

        Raises:
            ConfigError: the preset or a field is unknown, or the fields contradict each other.
        """
        if isinstance(model, str):
            return Architecture(**pick(PRESETS, model, "preset"))
        if isinstance(model, Architecture):
            return model
        from deepseek.model.config import ModelConfig

        if not isinstance(model, ModelConfig):
            model = ModelConfig(**checks.mapping("model", model))
        values = {field.name: getattr(model, field.name) for field in fields(Architecture)}
        values["dense_layers"] = tuple(model.dense_layers or ())
        if model.lsh_exact_layers is not None:
            values["lsh_exact_layers"] = tuple(model.lsh_exact_layers)
        return Architecture(**values)

    @property
    def groups(self) -> int:
        """Number G of key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width K of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def norms_per_layer(self) -> int:
        """Number of norms of the residual stream in a block."""
        return 4 if self.post_norms else 2

    @property
    def shared_width(self) -> int:
        """Total width of the shared experts of a layer."""
        if self.shared_expert_dim is not None:
            return self.shared_expert_dim
        return self.num_shared_experts * self.expert_dim

    @property
    def chosen(self) -> float:
        """Routed experts per token: all, top-k, or with dynamic routing the target mean (without a
        target, the maximum).
        """
        if self.routing_strategy == "dense":
            return self.num_experts
        if self.routing_strategy == "topk":
            return self.max_experts
        return self.target_experts or self.max_experts

    @property
    def sparse_layers(self) -> int:
        """Number of mixture-of-experts layers."""
        if self.num_experts == 0:
            return 0
        dense = [layer for layer in self.dense_layers if layer < self.num_hidden_layers]
        return self.num_hidden_layers - len(dense)

    @property
    def lsh_layers(self) -> int:
        """Number of layers with LSH attention."""
        if self.attention != "lsh":
            return 0
        exact = range(2) if self.lsh_exact_layers is None else self.lsh_exact_layers
        return self.num_hidden_layers - len(
            {layer for layer in exact if layer < self.num_hidden_layers}
        )

    def row_length(self, length: int | None) -> int:
        """Return the requested tokens per row; None: the longest context.

        Raises:
            ConfigError: the number is out of range.
        """
        if length is None:
            return self.max_position_embeddings
        return checks.whole("length", length, least=1, most=checks.MAX_SIZE)

    def attention_kind(self, kind: str | None) -> str:
        """Return the requested one of `ATTENTION_KINDS`; None: as the config says, "flash" for full
        attention.

        Raises:
            ConfigError: there is no such kind.
        """
        if kind is None:
            return "lsh" if self.attention == "lsh" else "flash"
        return checks.choice("attention", kind, ATTENTION_KINDS)

    def attending(self, kind: str) -> "Architecture":
        """Return the same model with LSH or full attention, by the kind."""
        return replace(self, attention="lsh" if kind == "lsh" else "full")

    def candidates(self, length: int) -> int:
        """Return the maximum number of keys that a query of LSH attention attends to in a
        context.
        """
        probed = self.lsh_rounds * self.lsh_probes * self.lsh_bucket_window
        return min(length, self.lsh_local_window + self.lsh_sinks + probed)
