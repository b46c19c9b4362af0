"""Accelerators by their data sheets, and number formats by their bytes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Data-sheet figures of an accelerator.

    Attributes:
        memory: memory in bytes.
        flops: dense bf16 FLOP per second.
        node_link: bandwidth within a node, in bytes per second.
        link: bandwidth between nodes, in bytes per second.
        utilisation: share of `flops` that matrix products of training and prefill achieve (0.4).
        bandwidth: bandwidth of its memory, in bytes per second.
        bandwidth_share: share of `bandwidth` that decoding achieves (0.6).
        hop: seconds that a reduction between devices takes beside its transfer.
    """

    memory: float
    flops: float
    node_link: float
    link: float
    utilisation: float = 0.4
    bandwidth: float = 1e12
    bandwidth_share: float = 0.6
    hop: float = 10e-6


DEVICES = {
    "a100": Device(80e9, 312e12, 300e9, 25e9, bandwidth=2.0e12),
    "h100": Device(80e9, 989e12, 450e9, 50e9, bandwidth=3.35e12),
    "h200": Device(141e9, 989e12, 450e9, 50e9, bandwidth=4.8e12),
    "laptop": Device(16e9, 1e12, 1e9, 1e9, bandwidth=80e9),
}


@dataclass(frozen=True)
class NumberFormats:
    """Bytes per number in training.

    Attributes:
        weights: of the trained weights that the optimiser changes.
        gradients: of the gradients.
        moments: of both moments of Adam together.
        compute: of activations and gathered weights.
    """

    weights: int
    gradients: int
    moments: int
    compute: int


FORMATS = {
    "mixed": NumberFormats(4, 4, 8, 2),
    "float32": NumberFormats(4, 4, 8, 4),
    "bfloat16": NumberFormats(2, 2, 4, 2),
}
"""`mixed`: fp32 weights, gradients and moments, bf16 products (arXiv:1710.03740)."""

WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
QUANTISED_BYTES = {8: 1.03, 4: 0.57}
"""Bytes per weight with its scales: our 8-bit format takes 0.258 of fp32
(benchmarks/results/int8_quality.json), 4 bits with a scale in 16 bits for every 32 weights 0.5625.
"""
