"""Estimate the memory, time, communication and scaling of a training run, without allocating it.

The model is mixed-precision training with ZeRO (arXiv:1910.02054). Weights, gradients and two
moments in fp32 take 16 bytes per parameter. Stage 1 shards the moments over N processes, stage 2
the gradients too, stage 3 the weights too: then the unit that is being computed is gathered whole,
and each step gathers the weights twice and reduces the gradients once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from deepseek import checks
from deepseek.planning.architecture import Architecture
from deepseek.planning.hardware import (
    DEVICES,
    FORMATS,
    MAX_GPUS,
    WEIGHT_BYTES,
    Device,
    NumberFormats,
    device_of,
    quantised_bits,
)
from deepseek.planning.sizes import (
    Parameters,
    Shape,
    activations,
    attention_flops,
    copy_bytes,
    largest_tensor,
    parameters,
    score_bytes,
    weight_bytes,
)
from deepseek.registry import pick

if TYPE_CHECKING:
    from deepseek.model.config import ModelConfig

NODE = 8
"""Number of devices per node, which share the fast link."""

CHUNK_LOGITS = 1 << 23
"""Logits in memory at once (`kernels/cross_entropy.py`); a test compares."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes per device, by part.

    Attributes:
        weights: weights, or this device's shard of them.
        gradients: gradients, or this device's shard of them.
        optimiser: moments, or this device's shard of them.
        gathered: units that are gathered to be computed, with the gradients of one.
        activations: what the blocks save for the backward pass, without attention.
        attention: what attention saves for the backward pass.
        logits: a chunk of logits, and the gradients of the output head's loss.
        update: temporary memory of the optimiser's step.
    """

    weights: float
    gradients: float
    optimiser: float
    gathered: float
    activations: float
    attention: float
    logits: float
    update: float

    @property
    def state(self) -> float:
        """Weights, gradients and moments."""
        return self.weights + self.gradients + self.optimiser

    @property
    def total(self) -> float:
        """Sum of all parts, although they are not all in memory at once."""
        passes = self.gathered + self.activations + self.attention + self.logits
        return self.state + passes + self.update

    @property
    def peak(self) -> float:
        """Peak memory.

        Gradients are allocated while activations are freed, so the peak is at the beginning of the
        backward pass or after it, in the optimiser's step.
        """
        backward = self.gathered + self.activations + self.attention + self.logits
        step = self.gradients + self.update
        return self.weights + self.optimiser + max(backward, step)


@dataclass(frozen=True)
class Scale:
    """Estimates for a run on a number of devices, with constant tokens per device and step.

    Attributes:
        gpus: number of devices.
        memory: bytes per device.
        gathered: bytes that each device receives for weights per step.
        reduced: bytes that each device sends for gradients per step.
        seconds: duration of a step.
        efficiency: throughput per device relative to a device that never waits for communication.
    """

    gpus: int
    memory: float
    gathered: float
    reduced: float
    seconds: float
    efficiency: float


@dataclass(frozen=True)
class Plan:
    """A planned training run.

    Attributes:
        config: the model.
        device: the accelerator.
        gpus: number of devices.
        tokens: total training tokens.
        tokens_per_gpu: tokens per device and step.
        recompute: whether to use activation checkpointing: save only the inputs of blocks and
            recompute the blocks in the backward pass.
        length: tokens per sequence.
        formats: bytes per number.
        zero: stage of ZeRO, 0 to 3.
        attention: "exact" (scores are materialised), "flash" or "lsh".
        trained: share of the parameters that is trained.
        bits: 8 or 4 for quantised frozen weights; None: they are in bf16.
    """

    config: Architecture
    device: Device
    gpus: int
    tokens: float
    tokens_per_gpu: int
    recompute: bool
    length: int
    formats: NumberFormats = FORMATS["mixed"]
    zero: int = 3
    attention: str = "flash"
    trained: float = 1.0
    bits: int | None = None

    @cached_property
    def shape(self) -> Shape:
        """Sizes of the model."""
        return Shape.of(self.config)

    @cached_property
    def parameters(self) -> Parameters:
        """Numbers of parameters by part."""
        return parameters(self.config)

    def memory(self, gpus: int) -> TrainingMemory:
        """Return the bytes per device by part, for a number of devices."""
        formats = self.formats
        trained = self.shape.parameters * self.trained
        frozen = weight_bytes(self.config, WEIGHT_BYTES["bfloat16"], self.bits).total
        weights = trained * formats.weights + (1 - self.trained) * frozen
        unit = self.shape.largest_unit
        return TrainingMemory(
            weights=weights / (gpus if self.zero >= 3 else 1),
            gradients=trained * formats.gradients / (gpus if self.zero >= 2 else 1),
            optimiser=trained * formats.moments / (gpus if self.zero >= 1 else 1),
            gathered=self._gathered(unit) if self.zero >= 3 and gpus > 1 else 0.0,
            activations=self._saved(
                activations(self.config, formats.compute, processor=self.device.processor)
            ),
            attention=self._saved_scores(),
            logits=self._head_bytes(),
            update=self._update_bytes(gpus),
        )

    def _update_bytes(self, gpus: int) -> float:
        """Return the bytes of the denominators that `torch.optim.AdamW` divides by.

        On a GPU it computes those of all parameters at once (its argument `foreach`); on a CPU it
        computes them tensor by tensor, with the root and the denominator at the same time.
        """
        number = self.formats.moments / 2
        trained = self.shape.parameters * self.trained
        if self.device.processor:
            return number * min(trained, 2.0 * largest_tensor(self.config))
        return number * trained / (gpus if self.zero >= 1 else 1)

    def _head_bytes(self) -> float:
        """Return the bytes of the output head's loss (`kernels/cross_entropy.py`).

        A chunk of logits with its gradient, and the gradients of the hidden states and of the head,
        which are computed together with the loss.
        """
        vocabulary = self.config.vocab_size
        chunk = min(self.tokens_per_gpu * vocabulary, CHUNK_LOGITS)
        gradients = (self.tokens_per_gpu + vocabulary) * self.config.hidden_size
        return 4.0 * (2 * chunk + gradients)

    def _gathered(self, unit: int) -> float:
        """Return the bytes of two gathered units and the gradients of one."""
        return unit * (2.0 * self.formats.compute + self.formats.gradients * (self.trained > 0))

    def _saved(self, bytes_per_token: float) -> float:
        """Return the bytes of activations that are saved at the same time."""
        saved = bytes_per_token * self.tokens_per_gpu
        layers = self.config.num_hidden_layers
        if not self.recompute:
            return saved
        # The activations of one block, and the inputs of all blocks.
        inputs = self.formats.compute * self.config.hidden_size * layers * self.tokens_per_gpu
        return saved / layers + inputs

    def _saved_scores(self) -> float:
        formats = self.formats
        rows = self.tokens_per_gpu / self.length
        saved = rows * score_bytes(self.config, self.length, 1, self.attention, formats.compute)
        if self.attention == "lsh":
            mixed = formats.compute < formats.weights
            saved += self.tokens_per_gpu * copy_bytes(
                self.config, mixed=mixed, processor=self.device.processor
            )
        return saved / self.config.num_hidden_layers if self.recompute else saved

    def at(self, gpus: int) -> Scale:
        """Return the estimates for a number of devices."""
        shape = self.shape
        device = self.device
        remote_share = (gpus - 1) / gpus
        compute = self.formats.compute
        # Stage 3 gathers the weights twice; 1 and 2 gather the updated weights once.
        # Without ZeRO every device updates all weights, with all-reduced gradients.
        passes = {0: 0.0, 3: 2.0}.get(self.zero, self.trained)
        gathered = passes * shape.parameters * compute * remote_share
        reduced = shape.parameters * self.trained * self.formats.gradients * remote_share
        reduced *= 1 if self.zero else 2
        computing = self.flops_per_token * self.tokens_per_gpu / (device.flops * device.utilisation)
        link = device.node_link if gpus <= NODE else device.link
        moving = (gathered + reduced) / link
        memory = self.memory(gpus).total
        # Communication overlaps with computation: the next unit is gathered during the current one.
        seconds = max(computing, moving)
        return Scale(gpus, memory, gathered, reduced, seconds, computing / seconds)

    @property
    def flops_per_token(self) -> float:
        """FLOP per token of forward and backward pass, recomputation included.

        Source: arXiv:2001.08361, section 2.1.
        """
        scores = attention_flops(self.config.attending(self.attention), self.length)
        # Half of the backward pass is for gradients of weights, which frozen weights do not need.
        weights = self.shape.active * (4 + 2 * self.trained)
        forward = 2 * self.shape.active + scores / 3
        return weights + scores + (forward if self.recompute else 0)

    @property
    def days(self) -> float:
        """Duration of the whole run in days."""
        steps = self.tokens / (self.gpus * self.tokens_per_gpu)
        return steps * self.at(self.gpus).seconds / 86400

    def table(self) -> list[Scale]:
        """Return the estimates for the powers of two below `gpus`, and for `gpus`."""
        counts = [2**power for power in range(self.gpus.bit_length()) if 2**power < self.gpus]
        return [self.at(count) for count in [*counts, self.gpus]]


def plan(
    model: "str | ModelConfig | Mapping[str, Any]",
    gpus: int = 8,
    *,
    device: str | Device = "h100",
    tokens: float = 300e9,
    rows_per_gpu: int = 2,
    recompute: bool = True,
    length: int | None = None,
    precision: str = "mixed",
    zero: int = 3,
    attention: str | None = None,
    trained: float = 1.0,
    bits: int | None = None,
) -> Plan:
    """Estimate memory, time and communication of a training run.

    Args:
        model: name of a preset, a config, or the fields of a config.
        gpus: number of devices.
        device: accelerator, one of `DEVICES`, or its figures.
        tokens: total training tokens.
        rows_per_gpu: rows per device and step.
        recompute: whether to use activation checkpointing.
        length: tokens per row; None: the longest context.
        precision: "mixed" (fp32 state, bf16 products), "float32" or "bfloat16".
        zero: stage of ZeRO, 0 to 3.
        attention: "exact" (scores are materialised), "flash" or "lsh"; None: as the config says,
            "flash" for full attention.
        trained: share of the parameters that is trained, in (0, 1].
        bits: 8 or 4 for frozen weights that are quantised as `deepseek quantize` does it, whichever
            they are; None: they are in bf16.

    Returns:
        The plan: `memory(gpus).total` is the bytes of each device, `days` the time, and `table()`
        the needs of one step for growing numbers of devices.

    Raises:
        ConfigError: a name is unknown, or a number is out of range.
    """
    architecture = Architecture.of(model)
    rows_per_gpu = checks.whole("rows_per_gpu", rows_per_gpu, least=1, most=checks.MAX_SIZE)
    row = architecture.row_length(length)
    checks.flag("recompute", recompute)
    return Plan(
        architecture,
        device_of(device),
        gpus=checks.whole("gpus", gpus, least=1, most=MAX_GPUS),
        tokens=checks.number("tokens", tokens, above=0),
        tokens_per_gpu=rows_per_gpu * row,
        recompute=recompute,
        length=row,
        formats=pick(FORMATS, precision, "precision"),
        zero=checks.whole("zero", zero, least=0, most=3),
        attention=architecture.attention_kind(attention),
        trained=checks.number("trained", trained, above=0, most=1),
        bits=None if bits is None else quantised_bits(bits),
    )


def deepspeed_config(
    *,
    gpus: int,
    rows_per_gpu: int,
    learning_rate: float,
    final_learning_rate: float,
    warmup_steps: int,
    steps: int,
    weight_decay: float,
) -> dict[str, Any]:
    """Return the content of a `ds_config.json` for DeepSpeed: ZeRO-3, bf16, AdamW, cosine decay.

    Args:
        gpus: number of devices.
        rows_per_gpu: rows per device and step.
        learning_rate: peak learning rate.
        final_learning_rate: learning rate at the last step.
        warmup_steps: steps of warm-up.
        steps: total steps.
        weight_decay: weight decay of AdamW.
    """
    return {
        "train_micro_batch_size_per_gpu": rows_per_gpu,
        "gradient_accumulation_steps": 1,
        "train_batch_size": rows_per_gpu * gpus,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": learning_rate, "betas": [0.9, 0.95], "weight_decay": weight_decay},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "warmup_num_steps": warmup_steps,
                "total_num_steps": steps,
                "cos_min_ratio": final_learning_rate / learning_rate,
            },
        },
    }


def training_memory(
    config: "ModelConfig | Architecture", tokens: int, *, processor: bool = False
) -> float:
    """Return the peak bytes that training in one process needs in fp32, products included.

    Args:
        config: the model.
        tokens: tokens per batch.
        processor: whether a CPU trains (default: a GPU).
    """
    architecture = Architecture.of(config)
    length = min(tokens, architecture.max_position_embeddings)
    device = replace(DEVICES["h100"], processor=processor)
    run = Plan(architecture, device, 1, tokens, tokens, False, length, FORMATS["float32"])
    return run.memory(1).peak
