"""AdamW and its learning-rate schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ROUTER, ROUTER_PACE = "router.weight", 0.1
"""Routers learn at a tenth of the rate: where all tokens agree on an expert, its logit moves by about the rate times
the width in one step, and no balancing follows that."""


@dataclass(frozen=True)
class OptimConfig:
    """How parameters move.

    Attributes:
        learning_rate: the peak, reached after the warm-up.
        warmup: share of all steps in which the rate rises linearly.
        final: share of the peak at the last step, reached along a cosine.
        weight_decay: decoupled decay (arXiv:1711.05101) of matrices; vectors are left alone.
        betas: decay rates of the two moments.
        clip_norm: gradients are scaled down to this norm over all parameters.
    """

    learning_rate: float
    warmup: float = 0.05
    final: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the rate of step `step` (from 0) of `steps`: linear warm-up, then half a cosine."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup - 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final + (1 - config.final) * cosine)


def adamw(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Return the optimizer of named parameters, its state keyed in their order."""
    routers = [parameter for name, parameter in parameters.items() if name.endswith(ROUTER)]
    matrices = [p for name, p in parameters.items() if p.dim() > 1 and not name.endswith(ROUTER)]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() <= 1]
    rate = config.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": matrices, "pace": 1.0},
        {"params": vectors, "pace": 1.0, "weight_decay": 0.0},
        {"params": routers, "pace": ROUTER_PACE, "lr": rate * ROUTER_PACE},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )


def optimizer_tensors(optimizer: torch.optim.AdamW, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the moments and step counts as `<parameter>.<moment>`."""
    return {
        f"{name}.{moment}": value
        for name, parameter in parameters.items()
        for moment, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.AdamW, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` returned."""
    for name, parameter in parameters.items():
        moments = {moment: tensors.get(f"{name}.{moment}") for moment in ("step", "exp_avg", "exp_avg_sq")}
        # The step count stays on the CPU, as AdamW keeps it; the moments lie beside their parameter.
        optimizer.state[parameter] = {
            moment: value.clone() if moment == "step" else value.to(parameter.device, copy=True)
            for moment, value in moments.items()
            if value is not None
        }


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float) -> float:
    """Scale gradients down to `norm` and return the norm they had; a non-finite one is returned untouched."""
    trained = list(parameters)
    found = nn.utils.get_total_norm(p.grad for p in trained if p.grad is not None)
    if isinstance(found, DTensor):  # of parameters sharded over processes
        found = found.full_tensor()
    if bool(found.isfinite()):
        nn.utils.clip_grads_with_norm_(trained, norm, found)
    return float(found)
