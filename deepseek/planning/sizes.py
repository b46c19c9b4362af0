"""Parameters, activations and FLOP of an architecture."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from deepseek.planning.architecture import Architecture
from deepseek.planning.matrices import DISTANCE_CONTEXTS, attention_matrices, matrices

if TYPE_CHECKING:
    from deepseek.model.config import ModelConfig

DISTANCE_BUCKETS = 32
"""Distances of dynamic positions (`kernels/bias/distance.py`); a test compares."""

FAR_FIELD_BLOCK = 64
"""Keys per block of LSH attention's far field (`kernels/lsh/far_field.py`); a test compares."""


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
        active: parameters that one token uses, added up over the layers. Those that several layers
            share count in each of them, so they may exceed the total.
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
        active: parameters that one token uses, as in `Parameters`, with `Architecture.chosen`
            routed experts per layer.
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
    layers = architecture.num_hidden_layers
    counts = {
        "embedding": 0,
        "head": 0,
        "attention": layers * attention_vectors(architecture),
        "dense": 0,
        "shared": 0,
        "routed": 0,
        "router": 0,
        "norms": (architecture.norms_per_layer * layers + 1) * architecture.hidden_size,
    }
    for matrix in matrices(architecture):
        counts[matrix.part] += matrix.count * matrix.size
    chosen = int(architecture.sparse_layers * architecture.chosen * expert_size(architecture))
    active = sum(counts.values()) - looked_up(architecture) - counts["routed"] + chosen
    return Parameters(**counts, active=active)


def looked_up(architecture: Architecture) -> int:
    """Return the parameters of embeddings that a token does not use in a product: untied ones are
    only looked up; tied ones also compute the logits. Of learned positions, a token reads only its
    own.
    """
    width = architecture.hidden_size
    table = 0 if architecture.tie_word_embeddings else architecture.vocab_size * width
    if architecture.positional_encoding != "learned":
        return table
    return table + (architecture.max_position_embeddings - 1) * width


def expert_size(architecture: Architecture) -> int:
    """Return the parameters of one routed expert."""
    return 3 * architecture.hidden_size * architecture.expert_dim


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights of a model.

    Attributes:
        total: all weights.
        resident: the weights that every token uses: all but the routed experts and the embeddings
            that are only looked up.
        expert: one routed expert.
    """

    total: float
    resident: float
    expert: float


def weight_bytes(architecture: Architecture, plain: float, bits: int | None) -> WeightBytes:
    """Return the bytes of the weights, as `deepseek quantize` writes them if there are bits.

    Args:
        architecture: the model.
        plain: bytes per weight that is not quantised, such as those of routers and norms.
        bits: 8 or 4 bits for the matrices of the layers; embeddings, head and routed experts have 8
            then. None: no weight is quantised.
    """
    count = parameters(architecture)
    numbers = 0
    found = dict.fromkeys(asdict(count), 0.0)
    for matrix in matrices(architecture):
        weights = matrix.count * matrix.size
        numbers += weights
        found[matrix.part] += weights * matrix.number_bytes(plain, bits)
    total = sum(found.values()) + plain * (count.total - numbers)
    unread = found["embedding"] * looked_up(architecture) / count.embedding
    return WeightBytes(
        total=total,
        resident=total - found["routed"] - unread,
        expert=found["routed"] / max(1, count.routed) * expert_size(architecture),
    )


def attention_parameters(architecture: Architecture) -> int:
    """Return the parameters of one layer's attention."""
    projections = sum(each.count * each.size for each in attention_matrices(architecture, 1))
    return projections + attention_vectors(architecture)


def attention_vectors(architecture: Architecture) -> int:
    """Return the parameters of one layer's attention that are not matrices: biases, norms on heads,
    and the curves of dynamic positions.
    """
    heads = architecture.num_attention_heads
    query = heads * architecture.head_width
    key = architecture.groups * architecture.head_width
    total = (query + 2 * key) * architecture.attention_bias
    total += architecture.hidden_size * architecture.attention_output_bias
    total += {"none": 0, "head": 2 * architecture.head_width, "width": query + key}[
        architecture.qk_norm
    ]
    if architecture.positional_encoding == "dpe":
        total += heads * DISTANCE_BUCKETS * (1 + DISTANCE_CONTEXTS)
        total += DISTANCE_CONTEXTS + 3 * heads
    return total


def largest_unit(architecture: Architecture, parts: Parameters) -> int:
    """Return the largest number of parameters that are gathered at once."""
    width = architecture.hidden_size
    pool = architecture.num_experts * expert_size(architecture)
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
    return max(matrix.size for matrix in matrices(architecture) if matrix.count)


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
            (arXiv:2205.14135), "lsh" the same number (`kernels/lsh/attention.py`) and the codes of
            the hash.
        bytes_per_number: bytes of a score.
    """
    tokens = length * batch
    queries = architecture.num_hidden_layers * architecture.num_attention_heads * tokens
    if kind == "exact":
        return float(bytes_per_number) * queries * length
    layers = architecture.attending(kind).lsh_layers
    return 4.0 * queries + layers * code_bytes(architecture) * tokens


def code_bytes(architecture: Architecture) -> float:
    """Return the bytes of LSH attention's hash codes per token and layer, in int32: the buckets
    that each query probes, and those of the keys with capacity to double (`kernels/lsh/decode.py`).
    """
    probes = min(architecture.lsh_probes, architecture.lsh_num_buckets)
    codes = architecture.num_attention_heads * probes + 2 * architecture.groups
    return 4.0 * architecture.lsh_rounds * codes


def copy_bytes(architecture: Architecture, *, mixed: bool, processor: bool = False) -> int:
    """Return the bytes per token of the copies that LSH attention saves for the backward pass and
    flash attention does not, over all layers.

    In mixed precision rotary positions leave queries and keys in fp32, and values and output follow
    them (`kernels/lsh/attention.py`). The output projection saves its input besides. On a GPU it
    always does: there the kernel's output is in fp32, head by head (`kernels/lsh/tiles.py`). So is
    it on a processor that multiplies bf16 no faster than fp32. That is not counted: such a
    processor trains in fp32 unless told otherwise.

    Args:
        architecture: the model.
        mixed: whether products are in 16 bits and weights in fp32.
        processor: whether a CPU trains (default: a GPU).
    """
    queries = architecture.num_attention_heads * architecture.head_width
    keys = architecture.groups * architecture.head_width
    widened = mixed and architecture.positional_encoding == "rope"
    copies = 4 * queries * (widened or not processor) + (2 * queries + 4 * keys) * widened
    return architecture.attending("lsh").lsh_layers * copies


def bucket_bytes(architecture: Architecture, length: int) -> float:
    """Return the most bytes that LSH attention caches of one sequence beside its keys and values,
    over all layers.

    They are the keys' codes with capacity to double, each bucket's ring of positions and its
    counter, the number of real tokens, and the block sums of a far field
    (`BucketCache.most_bytes` of `kernels/lsh/decode.py`; a test compares).

    Args:
        architecture: the model.
        length: tokens of the sequence.
    """
    ring = 1 + max(architecture.lsh_bucket_window, architecture.lsh_sinks)
    # Two buckets more than the hash has: sinks, and keys that no query probes.
    rings = 8.0 * (architecture.lsh_num_buckets + 2) * ring
    one_layer = architecture.groups * architecture.lsh_rounds * (2 * 4.0 * length + rings) + 8
    if architecture.lsh_far_field:
        blocks = length // FAR_FIELD_BLOCK + 1
        one_layer += blocks * 8.0 * (architecture.groups * 2 * architecture.head_width + 1)
    return architecture.lsh_layers * one_layer
