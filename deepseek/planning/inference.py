"""Estimate memory and time of inference: prefill and decoding.

Decoding is memory-bound: a token reads the weights that it uses and its keys and values. Prefill is
compute-bound. Devices share a model by tensor parallelism (arXiv:1909.08053), with
two reductions per layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Any

from deepseek import checks
from deepseek.planning.architecture import Architecture
from deepseek.planning.hardware import MAX_GPUS, WEIGHT_BYTES, Device, device_of, quantised_bits
from deepseek.planning.sizes import (
    Parameters,
    WeightBytes,
    attention_flops,
    bucket_bytes,
    parameters,
    score_bytes,
    weight_bytes,
)
from deepseek.registry import pick

if TYPE_CHECKING:
    from deepseek.model.config import ModelConfig

PREFILL_CHUNK = 512
"""Tokens computed at once in prefill, an assumption for GPUs. `Engine(prefill_chunk=...)` sets it;
its default of 64 suits CPUs.
"""


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes per device, by part.

    Attributes:
        weights: weights.
        keys_values: keys and values of all sequences at full length, with the hash codes and rings
            of LSH attention.
        activations: hidden states and logits of the largest batch of tokens: a chunk of a prompt,
            or one token of each sequence.
        attention: scores of one layer; with "flash" and "lsh" what is stored instead.
    """

    weights: float
    keys_values: float
    activations: float
    attention: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.keys_values + self.activations + self.attention


@dataclass(frozen=True)
class InferencePlan:
    """A planned deployment.

    Attributes:
        architecture: the model.
        device: the accelerator.
        gpus: devices that share the model.
        length: tokens of each sequence at its end.
        batch: sequences at a time.
        bits: 8 or 4 for quantised weights; None: none are.
        compute_bytes: bytes per number of everything else, including weights that are not
            quantised.
        attention: "exact", "flash" or "lsh".
    """

    architecture: Architecture
    device: Device
    gpus: int
    length: int
    batch: int
    bits: int | None
    compute_bytes: float
    attention: str

    @cached_property
    def parameters(self) -> Parameters:
        """Numbers of parameters."""
        return parameters(self.architecture)

    @cached_property
    def weights(self) -> WeightBytes:
        """Bytes of the weights."""
        return weight_bytes(self.architecture, self.compute_bytes, self.bits)

    @cached_property
    def memory(self) -> InferenceMemory:
        """Bytes per device."""
        model = self.architecture
        chunk = min(self.length, PREFILL_CHUNK)
        widths: list[float] = []
        if model.sparse_layers < model.num_hidden_layers:
            widths.append(model.intermediate_size)
        if model.sparse_layers:
            widths.append(model.shared_width + model.chosen * model.expert_dim)
        # Each device has the whole residual stream, its norm, output and sum, and its share of the
        # gate, up projection and their product.
        numbers = 4 * model.hidden_size + 3 * max(widths) / self.gpus
        hidden = max(chunk, self.batch) * numbers * self.compute_bytes
        logits = 4.0 * model.vocab_size * self.batch / self.gpus
        one_layer = score_bytes(model, self.length, self.batch, self.attention, 4)
        share = chunk / self.length if self.attention == "exact" else 1.0
        return InferenceMemory(
            weights=self.weights.total / self.gpus,
            keys_values=self.batch * self._sequence_bytes * self._key_share,
            activations=hidden + logits,
            attention=one_layer * share / model.num_hidden_layers / self.gpus,
        )

    @property
    def key_value_bytes(self) -> float:
        """Bytes of keys and values of one token, over all layers."""
        model = self.architecture
        return 2.0 * model.num_hidden_layers * model.groups * model.head_width * self.compute_bytes

    @property
    def _sequence_bytes(self) -> float:
        """Bytes that one sequence takes in the cache at full length."""
        return self.key_value_bytes * self.length + bucket_bytes(self._attending, self.length)

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory.total <= self.device.memory

    @property
    def prefill_seconds(self) -> float:
        """Seconds until the first token of one sequence of `length` tokens."""
        # Only the last token of a prompt has logits (`Chunk.keep` of `deepseek/runner.py`).
        head = self.architecture.vocab_size * self.architecture.hidden_size
        scores = attention_flops(self._attending, self.length) / 3
        flops = self.length * (2.0 * (self.parameters.active - head) + scores) + 2.0 * head
        speed = self.device.flops * self.device.utilisation * self.gpus
        passes = -(-self.length // PREFILL_CHUNK)
        return flops / speed + passes * self._hops(PREFILL_CHUNK)

    @property
    def token_seconds(self) -> float:
        """Seconds per decoding step, which gives each sequence a token."""
        model = self.architecture
        # The expected number of distinct experts that a batch chooses, if all are equally likely.
        share = 1 - (1 - min(1.0, model.chosen / max(1, model.num_experts))) ** self.batch
        experts = model.sparse_layers * model.num_experts * share
        exact = model.num_hidden_layers - self._attending.lsh_layers
        keys = exact * self.length + self._attending.lsh_layers * model.candidates(self.length)
        read_keys = self.key_value_bytes * keys / model.num_hidden_layers * self.batch
        weights = self.weights.resident + experts * self.weights.expert
        # Each device reads its share of both at the same time.
        moved = weights / self.gpus + read_keys * self._key_share
        flops = 2.0 * self.parameters.active * self.batch
        moving = moved / (self.device.bandwidth * self.device.bandwidth_share)
        computing = flops / (self.device.flops * self.device.utilisation * self.gpus)
        return max(moving, computing) + self._hops(self.batch)

    @property
    def _key_share(self) -> float:
        """Share of keys and values on the device with the most KV groups; a group is never
        split.
        """
        groups = self.architecture.groups
        return ceil(groups / self.gpus) / groups

    @property
    def _attending(self) -> Architecture:
        """The model with LSH attention where the plan says so."""
        return self.architecture.attending(self.attention)

    def _hops(self, tokens: int) -> float:
        """Return the seconds of all reductions between the devices for a number of tokens."""
        if self.gpus == 1:
            return 0.0
        link = self.device.node_link if self.gpus <= 8 else self.device.link
        volume = 2.0 * tokens * self.architecture.hidden_size * self.compute_bytes
        return 2 * self.architecture.num_hidden_layers * (self.device.hop + volume / link)


def plan_inference(
    model: "str | ModelConfig | Architecture | Mapping[str, Any]",
    gpus: int = 1,
    *,
    device: str | Device = "h100",
    length: int | None = None,
    batch: int = 1,
    dtype: str = "bfloat16",
    bits: int | None = None,
    attention: str | None = None,
) -> InferencePlan:
    """Estimate memory and time of inference.

    Args:
        model: name of a preset, a config, or the fields of a config.
        gpus: devices that share the model.
        device: accelerator, one of `DEVICES`, or its figures.
        length: tokens per sequence; None: the longest context.
        batch: sequences at a time.
        dtype: "bfloat16", "float16" or "float32", of activations and of the weights that are not
            quantised.
        bits: 8 or 4 for weights that are quantised as `deepseek quantize` does it; None: none are.
        attention: "exact" (scores are materialised), "flash" or "lsh"; None: as the config says,
            "flash" for full attention.

    Raises:
        ConfigError: a name is unknown, or a number is out of range.
    """
    architecture = Architecture.of(model)
    compute = pick(WEIGHT_BYTES, dtype, "dtype")
    return InferencePlan(
        architecture,
        device_of(device),
        gpus=checks.whole("gpus", gpus, least=1, most=MAX_GPUS),
        length=architecture.row_length(length),
        batch=checks.whole("batch", batch, least=1, most=checks.MAX_SIZE),
        bits=None if bits is None else quantised_bits(bits),
        compute_bytes=compute,
        attention=architecture.attention_kind(attention),
    )
