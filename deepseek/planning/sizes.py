"""Parameters, activations and FLOP of an architecture."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from deepseek.planning.architecture import Architecture

if TYPE_CHECKING:
    from deepseek.model.config import ModelConfig

DISTANCE_BUCKETS = 32
"""Distances of dynamic positions (`kernels/bias/distance.py`); a test compares."""

DISTANCE_CONTEXTS = 8
"""Learned curves of dynamic positions (`model/positions/dynamic.py`); a test compares."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by part.

    Attributes:
        embedding: input embeddings, with learned positions.
        head: output head; 0 if it shares the embeddings' weights.
        attention: projections, norms on heads, and score biases.
        dense: dense feed-forward networks.
        shared: always-active experts.
        routed: routed experts, shared pools counted once.
        router: routers.
        norms: norms of the residual stream.
        active: parameters that a token uses.
    """

    embedding: int
    head: int
    attention: int
    dense: int
    shared: int
    routed: int
    router: int
    norms: int
    active: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(asdict(self).values()) - self.active


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        parameters: total parameters.
        active: parameters used per token, with `target_experts` routed experts per layer, or
            `max_experts` if there is no target.
        largest_unit: largest number of parameters gathered at once: a block, a shared pool, or
            everything outside of both.
        activations: bytes of bf16 activations that one token saves for the backward pass.
        attention_flops: FLOP of attention scores and values per token at full length, forward and
            backward.
    """

    parameters: int
    active: int
    largest_unit: int
    activations: int
    attention_flops: float

    @staticmethod
    def of(model: "Architecture | ModelConfig | str") -> "Shape":
        """Return the sizes of a model."""
        architecture = Architecture.of(model)
        parts = parameters(architecture)
        return Shape(
            parts.total,
            parts.active,
            largest_unit(architecture, parts),
            activations(architecture),
            attention_flops(architecture, architecture.max_position_embeddings),
        )


def parameters(architecture: Architecture) -> Parameters:
    """Return the numbers of parameters, as `DeepSeekModel` has them."""
    width = architecture.hidden_size
    layers = architecture.num_hidden_layers
    sparse = architecture.sparse_layers
    table = architecture.vocab_size * width
    expert = 3 * width * architecture.expert_dim
    pools = sparse
    if architecture.num_experts and architecture.expert_sharing > 1:
        pools = math.ceil(layers / architecture.expert_sharing)
    routed = pools * architecture.num_experts * expert
    positions = 0
    if architecture.positional_encoding == "learned":
        positions = architecture.max_position_embeddings * width
    counts = {
        "embedding": table + positions,
        "head": 0 if architecture.tie_word_embeddings else table,
        "attention": layers * attention_parameters(architecture),
        "dense": (layers - sparse) * 3 * width * architecture.intermediate_size,
        "shared": sparse * 3 * width * architecture.shared_width,
        "routed": routed,
        "router": sparse * architecture.num_experts * width,
        "norms": (architecture.norms_per_layer * layers + 1) * width,
    }
    # Untied embeddings are only looked up; tied ones also compute the logits. Of the positions, a
    # token uses its own.
    looked_up = 0 if architecture.tie_word_embeddings else table
    looked_up += max(0, positions - width)
    chosen = int(sparse * architecture.chosen * expert)
    active = sum(counts.values()) - looked_up - routed + chosen
    return Parameters(**counts, active=active)


def attention_parameters(architecture: Architecture) -> int:
    """Return the parameters of one layer's attention."""
    width = architecture.hidden_size
    heads = architecture.num_attention_heads
    query = heads * architecture.head_width
    key = architecture.groups * architecture.head_width
    total = 2 * width * query + 2 * width * key
    total += (query + 2 * key) * architecture.attention_bias
    total += width * architecture.attention_output_bias
    total += {"none": 0, "head": 2 * architecture.head_width, "width": query + key}[
        architecture.qk_norm
    ]
    if architecture.positional_encoding == "dpe":
        curves = heads * DISTANCE_BUCKETS * (1 + DISTANCE_CONTEXTS)
        gates = (width + 1) * (DISTANCE_CONTEXTS + heads)
        total += curves + gates + 2 * heads
    return total


def largest_unit(architecture: Architecture, parts: Parameters) -> int:
    """Return the most parameters that are gathered at once."""
    width = architecture.hidden_size
    expert = 3 * width * architecture.expert_dim
    pool = architecture.num_experts * expert
    block = attention_parameters(architecture) + architecture.norms_per_layer * width
    units = [block + 3 * width * architecture.intermediate_size]
    if architecture.sparse_layers:
        own = architecture.num_experts * width + 3 * width * architecture.shared_width
        shared = architecture.expert_sharing > 1
        units = [block + own + (0 if shared else pool), pool if shared else 0]
        if architecture.sparse_layers < architecture.num_hidden_layers:
            units.append(block + 3 * width * architecture.intermediate_size)
    return max(*units, parts.embedding + parts.head + width)


def largest_tensor(architecture: Architecture) -> int:
    """Return the parameters of the largest weight."""
    width = architecture.hidden_size
    rows = [architecture.vocab_size, architecture.num_attention_heads * architecture.head_width]
    if architecture.sparse_layers < architecture.num_hidden_layers:
        rows.append(architecture.intermediate_size)
    if architecture.sparse_layers:
        # Gate and up projections of all experts of a pool are one tensor.
        rows.append(2 * architecture.num_experts * architecture.expert_dim)
        rows.append(architecture.shared_width)
    return max(rows) * width


def activations(
    architecture: Architecture, bytes_per_number: int = 2, *, processor: bool = False
) -> int:
    """Return the bytes of activations per token: the inputs of every matrix product, of every
    activation function and of every norm.

    Source: arXiv:2205.05198, without its dropout.

    Args:
        architecture: the model.
        bytes_per_number: bytes of an activation.
        processor: whether mixtures are computed as on a CPU (`kernels/moe/many_tokens.py`), which
            keeps gate and up projections of routed experts and computes the rest again. A GPU
            (`mix_experts_grouped`) keeps gate, up, and three products of them, and a sorted copy of
            the inputs.
    """
    heads = 2 * (architecture.num_attention_heads + architecture.groups) * architecture.head_width
    sparse = architecture.sparse_layers
    dense = architecture.num_hidden_layers - sparse
    expert = 5 * architecture.expert_dim + architecture.hidden_size
    if processor:
        expert = 2 * architecture.expert_dim
    per_layer = architecture.num_hidden_layers * (6 * architecture.hidden_size + heads)
    per_sparse = sparse * (4 * architecture.shared_width + architecture.chosen * expert)
    per_dense = dense * 4 * architecture.intermediate_size
    return round(bytes_per_number * (per_layer + per_sparse + per_dense))


def attention_flops(architecture: Architecture, length: int) -> float:
    """Return the FLOP of scores and values per token, forward and backward.

    Args:
        architecture: the model.
        length: tokens of the context. Half of them are past, because of the causal mask.
    """
    width = architecture.num_attention_heads * architecture.head_width
    exact = architecture.num_hidden_layers - architecture.lsh_layers
    keys = exact * length / 2 + architecture.lsh_layers * architecture.candidates(length)
    return 12.0 * width * keys


def score_bytes(
    architecture: Architecture, length: int, batch: int, kind: str, bytes_per_number: int = 2
) -> float:
    """Return the bytes of attention that a pass keeps for the backward pass, over all layers.

    Args:
        architecture: the model.
        length: tokens per sequence.
        batch: sequences.
        kind: "exact" keeps every score of every head, "flash" one fp32 number per query and head
            (arXiv:2205.14135), "lsh" the scores of the candidates.
        bytes_per_number: bytes of a score.
    """
    queries = architecture.num_hidden_layers * architecture.num_attention_heads * length * batch
    if kind == "flash":
        return 4.0 * queries
    keys = length if kind == "exact" else architecture.candidates(length)
    return float(bytes_per_number) * queries * keys
