"""What a training run needs: memory, time, communication, and how it scales. Arithmetic only,
nothing is allocated.

Memory is that of mixed precision under ZeRO-3 semantics (arXiv:1910.02054): 16 bytes a parameter
for weights, gradients and two moments in fp32, spread over N processes; the unit being computed is
gathered whole. Each step gathers the weights twice and reduces the gradients once. (Not `plan.py`,
as `deepseek.plan` is the function.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from deepseek.model.config import ModelConfig
from deepseek.model.moe.experts import Experts
from deepseek.model.presets import PRESETS
from deepseek.model.transformer import DeepSeekModel
from deepseek.registry import pick

STATE_BYTES = 16
"""A trained parameter: fp32 weight and gradient, two fp32 moments."""

NODE = 8
"""Devices that share the fast link."""


@dataclass(frozen=True)
class Device:
    """An accelerator, as its vendor states it.

    Attributes:
        memory: bytes.
        flops: dense bf16, per second.
        node_link, link: bytes per second to its neighbours in a node, and to other nodes.
        utilisation: share of `flops` that training reaches.
    """

    memory: float
    flops: float
    node_link: float
    link: float
    utilisation: float = 0.4


DEVICES = {
    "a100": Device(80e9, 312e12, 300e9, 25e9),
    "h100": Device(80e9, 989e12, 450e9, 50e9),
    "h200": Device(141e9, 989e12, 450e9, 50e9),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        parameters: in all.
        active: those that take part in one token; of routed experts, as many as `target_experts` or
            `max_experts`.
        largest_unit: parameters gathered at once: a block, a shared pool, or what lies outside of
            both.
        activations: bytes that one token keeps for the backward pass, in bf16.
        attention_flops: of one token's scores and values at full length, forward and backward.
    """

    parameters: int
    active: int
    largest_unit: int
    activations: int
    attention_flops: float

    @staticmethod
    def of(config: ModelConfig) -> "Shape":
        """Measure a model on the meta device."""
        with torch.device("meta"):
            model = DeepSeekModel(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        units = [_size(module) for module in (*model.layers, *model.expert_pools)]
        units.append(total - sum(units))
        calls = sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
        routed = sum(_size(module) for module in model.modules() if isinstance(module, Experts))
        chosen = config.target_experts or config.max_experts
        expert = 3 * config.hidden_size * config.expert_dim
        embedding = (
            0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        )  # a row is looked up
        active = total - embedding - routed + int(calls * chosen * expert)
        return Shape(
            total, active, max(units), _activations(config, chosen), _attention_flops(config)
        )


@dataclass(frozen=True)
class Scale:
    """A run on `gpus` devices, each with its own `tokens` a step.

    Attributes:
        gathered, reduced: bytes that each device receives for weights and sends for gradients in a
            step.
        memory: bytes on each device.
        seconds: of a step.
        efficiency: speed per device relative to one that never waits.
    """

    gpus: int
    memory: float
    gathered: float
    reduced: float
    seconds: float
    efficiency: float


@dataclass(frozen=True)
class Plan:
    """A model, a device and an amount of text.

    Attributes:
        tokens: to train on in all.
        tokens_per_gpu: of a step.
        recompute: whether blocks are computed again in the backward pass, so that only their inputs
            are kept.
    """

    config: ModelConfig
    device: Device
    gpus: int
    tokens: float
    tokens_per_gpu: int
    recompute: bool

    @cached_property
    def shape(self) -> Shape:
        """Sizes of the model."""
        return Shape.of(self.config)

    def at(self, gpus: int) -> Scale:
        """Return memory, traffic and time on so many devices."""
        shape = self.shape
        device = self.device
        away = (gpus - 1) / gpus
        gathered, reduced = (
            2 * shape.parameters * 2 * away,
            shape.parameters * 4 * away,
        )  # bf16 twice, fp32 once
        computing = self.flops_per_token * self.tokens_per_gpu / (device.flops * device.utilisation)
        link = device.node_link if gpus <= NODE else device.link
        moving = (gathered + reduced) / link
        memory = shape.parameters * STATE_BYTES / gpus + self.working_bytes
        seconds = max(computing, moving)  # gathering the next unit while this one is computed
        return Scale(gpus, memory, gathered, reduced, seconds, computing / seconds)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, and the forward pass again under recomputation (arXiv:2001.08361,
        section 2.1).
        """
        return (self.shape.active * 6 + self.shape.attention_flops) * (
            4 / 3 if self.recompute else 1
        )

    @property
    def working_bytes(self) -> float:
        """What a device needs beside its part of the state: two gathered units, gradients of one,
        activations.
        """
        kept: float = self.shape.activations * self.tokens_per_gpu
        layers = self.config.num_hidden_layers
        if self.recompute:
            kept = kept / layers + 2 * self.config.hidden_size * layers * self.tokens_per_gpu
        return self.shape.largest_unit * (2 * 2 + 4) + kept

    @property
    def days(self) -> float:
        """Duration of the whole run."""
        steps = self.tokens / (self.gpus * self.tokens_per_gpu)
        return steps * self.at(self.gpus).seconds / 86400

    def table(self) -> list[Scale]:
        """Return the powers of two up to `gpus`, and `gpus`."""
        counts = [2**power for power in range(self.gpus.bit_length()) if 2**power < self.gpus]
        return [self.at(count) for count in [*counts, self.gpus]]


def plan(
    model: str | ModelConfig | Mapping[str, Any],
    gpus: int = 8,
    *,
    device: str = "h100",
    tokens: float = 300e9,
    rows_per_gpu: int = 2,
    recompute: bool = True,
) -> Plan:
    """Return the plan of a training run; print nothing, allocate nothing.

    Args:
        model: a preset's name, a config, or the fields of one.
        device: one of `DEVICES`.
        tokens, recompute: see `Plan`.
        rows_per_gpu: rows of the longest context that a device takes a step.

    Raises:
        ConfigError: the preset or the device is unknown.
    """
    config = model if isinstance(model, ModelConfig) else _config(model)
    tokens_per_gpu = rows_per_gpu * config.max_position_embeddings
    return Plan(config, pick(DEVICES, device, "device"), gpus, tokens, tokens_per_gpu, recompute)


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
    """Return the `ds_config.json` of the same run for DeepSpeed: ZeRO-3, bf16, AdamW with warm-up
    and cosine.
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


def training_memory(config: ModelConfig, tokens: int) -> float:
    """Return the bytes that training in one process takes with so many tokens a batch."""
    shape = Shape.of(config)
    return float(shape.parameters * STATE_BYTES + shape.activations * tokens)


def _config(model: str | Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(**(pick(PRESETS, model, "preset") if isinstance(model, str) else model))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _activations(config: ModelConfig, chosen: float) -> int:
    """Return the bytes that a token keeps: inputs of every product and norm (arXiv:2205.05198,
    without its dropout).
    """
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    total = 0.0
    for layer in range(config.num_hidden_layers):
        sparse = config.is_sparse(layer)
        width: float = (
            (config.shared_expert_dim or 0) + chosen * config.expert_dim
            if sparse
            else config.intermediate_size
        )
        total += 2 * (6 * config.hidden_size + heads + 4 * width)
    return round(total)


def _attention_flops(config: ModelConfig) -> float:
    width = config.num_attention_heads * config.head_dim
    return (
        6.0 * config.num_hidden_layers * width * config.max_position_embeddings
    )  # half of 12: causal
