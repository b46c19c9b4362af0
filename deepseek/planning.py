"""Estimate the memory, time, communication and scaling of a training run, without allocating it.

The model is mixed-precision training with ZeRO-3 (arXiv:1910.02054). Weights, gradients and two
moments in fp32 take 16 bytes per parameter, sharded over N processes. The unit that is being
computed is gathered whole. Each step gathers the weights twice and reduces the gradients once.

This file is not called `plan.py`, because `deepseek.plan` is the function.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from deepseek import checks
from deepseek.model.config import ModelConfig
from deepseek.model.moe.experts import Experts
from deepseek.model.presets import PRESETS
from deepseek.model.transformer import DeepSeekModel
from deepseek.registry import pick

STATE_BYTES = 16
"""Bytes per trained parameter: fp32 weight, fp32 gradient and two fp32 moments."""

MAX_GPUS = 1 << 24

NODE = 8
"""Number of devices per node, which share the fast link."""


@dataclass(frozen=True)
class Device:
    """Data-sheet figures of an accelerator.

    Attributes:
        memory: memory in bytes.
        flops: dense bf16 FLOP per second.
        node_link: bandwidth within a node, in bytes per second.
        link: bandwidth between nodes, in bytes per second.
        utilisation: share of `flops` that training achieves (default 0.4).
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
    def of(config: ModelConfig) -> "Shape":
        """Return the sizes of a model, measured on the meta device."""
        with torch.device("meta"):
            model = DeepSeekModel(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        units = [_size(module) for module in (*model.layers, *model.expert_pools)]
        units.append(total - sum(units))
        calls = sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
        routed = sum(_size(module) for module in model.modules() if isinstance(module, Experts))
        chosen = config.target_experts or config.max_experts
        expert = 3 * config.hidden_size * config.expert_dim
        # Untied embeddings are only looked up; tied ones also compute the logits.
        embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        active = total - embedding - routed + int(calls * chosen * expert)
        return Shape(
            total, active, max(units), _activations(config, chosen), _attention_flops(config)
        )


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
        """Return the estimates for a number of devices."""
        shape = self.shape
        device = self.device
        remote_share = (gpus - 1) / gpus
        gathered = 2 * shape.parameters * 2 * remote_share  # bf16, twice
        reduced = shape.parameters * 4 * remote_share  # fp32, once
        computing = self.flops_per_token * self.tokens_per_gpu / (device.flops * device.utilisation)
        link = device.node_link if gpus <= NODE else device.link
        moving = (gathered + reduced) / link
        memory = shape.parameters * STATE_BYTES / gpus + self.working_bytes
        # Communication overlaps with computation: the next unit is gathered during this one.
        seconds = max(computing, moving)
        return Scale(gpus, memory, gathered, reduced, seconds, computing / seconds)

    @property
    def flops_per_token(self) -> float:
        """FLOP per token of forward and backward pass, recomputation included.

        Source: arXiv:2001.08361, section 2.1.
        """
        return (self.shape.active * 6 + self.shape.attention_flops) * (
            4 / 3 if self.recompute else 1
        )

    @property
    def working_bytes(self) -> float:
        """Bytes per device beside its shard of the state.

        These are two gathered units, the gradients of one unit, and activations.
        """
        activations: float = self.shape.activations * self.tokens_per_gpu
        layers = self.config.num_hidden_layers
        if self.recompute:
            # The activations of one block, and the bf16 inputs of all blocks.
            inputs = 2 * self.config.hidden_size * layers * self.tokens_per_gpu
            activations = activations / layers + inputs
        return self.shape.largest_unit * (2 * 2 + 4) + activations

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
    model: str | ModelConfig | Mapping[str, Any],
    gpus: int = 8,
    *,
    device: str = "h100",
    tokens: float = 300e9,
    rows_per_gpu: int = 2,
    recompute: bool = True,
) -> Plan:
    """Estimate memory, time and communication of a training run.

    Args:
        model: name of a preset, a config, or the fields of a config.
        gpus: number of devices.
        device: accelerator, one of `DEVICES`.
        tokens: total training tokens.
        rows_per_gpu: rows per device and step, each as long as the longest context.
        recompute: whether to use activation checkpointing.

    Raises:
        ConfigError: the preset or the device is unknown, or a number is not positive.
    """
    config = model if isinstance(model, ModelConfig) else _config(model)
    gpus = checks.whole("gpus", gpus, least=1, most=MAX_GPUS)
    rows_per_gpu = checks.whole("rows_per_gpu", rows_per_gpu, least=1, most=checks.MAX_SIZE)
    tokens = checks.number("tokens", tokens, above=0)
    checks.flag("recompute", recompute)
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


def training_memory(config: ModelConfig, tokens: int) -> float:
    """Return the bytes that training in one process needs with `tokens` tokens per batch."""
    shape = Shape.of(config)
    return float(shape.parameters * STATE_BYTES + shape.activations * tokens)


def _config(model: str | Mapping[str, Any]) -> ModelConfig:
    if not isinstance(model, str):
        model = checks.mapping("model", model)
    return ModelConfig(**(pick(PRESETS, model, "preset") if isinstance(model, str) else model))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _activations(config: ModelConfig, chosen: float) -> int:
    """Return the bytes of activations per token: the inputs of every matrix product and norm.

    Source: arXiv:2205.05198, without its dropout.
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
    # Half of 12, because the causal mask leaves half of the scores.
    return 6.0 * config.num_hidden_layers * width * config.max_position_embeddings
