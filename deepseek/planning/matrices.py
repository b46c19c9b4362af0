"""The weight matrices of an architecture, and their bytes if they are quantised."""

import math
from dataclasses import dataclass

from deepseek.planning.architecture import Architecture
from deepseek.planning.hardware import QUANTISED_BYTES

DISTANCE_CONTEXTS = 8
"""Learned curves of dynamic positions (`model/positions/dynamic.py`); a test compares."""

GROUP = 64
"""Weights of a row with one scale (`kernels/int8_layout.py`); a test compares."""

SMALLEST = 1 << 12
"""Elements of the smallest matrix that is quantised (`model/quantised.py`); a test compares."""

LAYERS = ("attention", "dense", "shared")
"""Parts that `deepseek quantize` writes with the bits that are asked for; `UNQUANTISED` stays as it
is, and all others have 8 bits (`export/quantize.py`).
"""

UNQUANTISED = "router"


@dataclass(frozen=True)
class Matrix:
    """Weight matrices of one shape.

    Attributes:
        part: part of the model, as in `sizes.Parameters`.
        count: number of such matrices.
        rows: outputs of one; those of all experts of a pool, which are one tensor.
        columns: inputs.
    """

    part: str
    count: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Parameters of one matrix."""
        return self.rows * self.columns

    def number_bytes(self, plain: float, bits: int | None) -> float:
        """Return the bytes per weight.

        Args:
            plain: bytes per weight that is not quantised.
            bits: 8 or 4; None: no matrix is quantised.
        """
        large = self.size >= SMALLEST and self.columns % GROUP == 0
        if bits is None or self.part == UNQUANTISED or not large:
            return plain
        return QUANTISED_BYTES[bits if self.part in LAYERS else 8]


def matrices(architecture: Architecture) -> list[Matrix]:
    """Return the weight matrices of a model."""
    width = architecture.hidden_size
    layers = architecture.num_hidden_layers
    sparse = architecture.sparse_layers
    experts = architecture.num_experts
    pools = sparse
    if experts and architecture.expert_sharing > 1:
        pools = math.ceil(layers / architecture.expert_sharing)
    learned = architecture.positional_encoding == "learned"
    return [
        Matrix("embedding", 1, architecture.vocab_size, width),
        Matrix("embedding", int(learned), architecture.max_position_embeddings, width),
        Matrix("head", int(not architecture.tie_word_embeddings), architecture.vocab_size, width),
        *attention_matrices(architecture, layers),
        *_feed_forward("dense", layers - sparse, architecture.intermediate_size, width),
        *_feed_forward("shared", sparse, architecture.shared_width, width),
        Matrix("routed", pools, 2 * experts * architecture.expert_dim, width),
        Matrix("routed", pools, experts * width, architecture.expert_dim),
        Matrix("router", sparse, experts, width),
    ]


def attention_matrices(architecture: Architecture, layers: int) -> list[Matrix]:
    """Return the weight matrices of attention.

    Args:
        architecture: the model.
        layers: number of layers to count.
    """
    width = architecture.hidden_size
    query = architecture.num_attention_heads * architecture.head_width
    key = architecture.groups * architecture.head_width
    dynamic = layers if architecture.positional_encoding == "dpe" else 0
    return [
        Matrix("attention", layers, query, width),
        Matrix("attention", 2 * layers, key, width),
        Matrix("attention", layers, width, query),
        Matrix("attention", dynamic, DISTANCE_CONTEXTS, width),
        Matrix("attention", dynamic, architecture.num_attention_heads, width),
    ]


def _feed_forward(part: str, layers: int, inner: int, width: int) -> list[Matrix]:
    """Return the gate, up and down projections of gated networks of an inner width."""
    return [Matrix(part, 2 * layers, inner, width), Matrix(part, layers, width, inner)]
