"""Accelerators by their data sheets, and number formats by their bytes."""

from dataclasses import dataclass

from deepseek import checks
from deepseek.registry import pick

MAX_GPUS = 1 << 24


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
        hop: seconds that a reduction between devices takes beside its transfer (10 microseconds).
        processor: whether it is a CPU. Its kernels for mixtures keep less for the backward pass,
            and its optimiser works on one tensor after the other.

    The shares and `hop` are assumptions. Runs of Llama 3 achieved 38 to 43 % of the arithmetic
    (arXiv:2407.21783, table 4).
    """

    memory: float
    flops: float
    node_link: float
    link: float
    utilisation: float = 0.4
    bandwidth: float = 1e12
    bandwidth_share: float = 0.6
    hop: float = 10e-6
    processor: bool = False


DEVICES = {
    "a100": Device(80e9, 312e12, 300e9, 25e9, bandwidth=2.0e12),
    "h100": Device(80e9, 989e12, 450e9, 50e9, bandwidth=3.35e12),
    "h200": Device(141e9, 989e12, 450e9, 50e9, bandwidth=4.8e12),
    "laptop": Device(16e9, 1e12, 1e9, 1e9, bandwidth=89.6e9, processor=True),
}
"""Accelerators by the data sheets of their SXM modules: half of NVLink's bandwidth, which counts
both directions, and InfiniBand of 200 Gbit/s (A100) or 400 Gbit/s (H100, H200) for each.

`laptop` is no data sheet: 8 cores with 32 FLOP a cycle at 4 GHz, and two channels of DDR5-5600.
"""


def device_of(device: str | Device) -> Device:
    """Return a device: itself, or the one of `DEVICES` with this name.

    Raises:
        ConfigError: there is no such device.
    """
    return device if isinstance(device, Device) else pick(DEVICES, device, "device")


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
QUANTISED_BYTES = {8: 1.03125, 4: 0.53125}
"""Bytes per weight with a scale of 16 bits for every 64 weights (`kernels/int8_layout.py`); a test
compares.
"""


def quantised_bits(bits: int) -> int:
    """Return the bits of quantised weights, 8 or 4.

    Raises:
        ConfigError: the bits are others.
    """
    bits = checks.whole("bits", bits)
    checks.choice("bits", str(bits), map(str, QUANTISED_BYTES))
    return bits
