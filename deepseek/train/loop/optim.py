"""AdamW, learning-rate schedules, and the state of a run as tensors."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseek import checks
from deepseek.errors import ConfigError, shown

ROUTER = "router.weight"
ROUTER_PACE = 0.1
"""Routers learn at a tenth of the learning rate. Where all tokens agree on an expert, one step
moves its logit by about rate times width, too fast for load balancing to follow.
"""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer settings.

    Attributes:
        learning_rate: peak learning rate, reached after the warm-up.
        warmup: share of the steps in which the rate rises linearly.
        final: learning rate at the last step, as a share of the peak; the decay is a cosine.
        weight_decay: decoupled decay (arXiv:1711.05101) of matrices; vectors have none.
        betas: decay rates of the two moments.
        clip_norm: largest norm of the gradient over all parameters; larger ones are scaled down.
        paces: learning rates of named parameters as shares of the others'; default: 1 for all but
            routers.
    """

    learning_rate: float
    warmup: float = 0.05
    final: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    paces: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.apply(OPTIM, self)


def _paces(name: str, value: Any) -> dict[str, float]:
    shares = checks.mapping(name, value)
    return {key: checks.number(f"{name}[{key}]", share, least=0) for key, share in shares.items()}


def _betas(name: str, value: Any) -> tuple[float, ...]:
    rates = checks.sequence(name, value, partial(checks.number, least=0, below=1), "two numbers")
    if len(rates) != 2:
        raise ConfigError(f"{name}={shown(value)} must be two numbers.")
    return tuple(rates)


OPTIM: dict[str, checks.Check] = {
    "learning_rate": partial(checks.number, least=0),
    "warmup": partial(checks.number, least=0, most=1),
    "final": partial(checks.number, least=0),
    "weight_decay": partial(checks.number, least=0),
    "betas": _betas,
    "clip_norm": partial(checks.number, above=0),
    "paces": _paces,
}
"""Type and range of each field of `OptimConfig`."""


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of `step` (from 0) of `steps`: linear warm-up, then cosine decay."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup - 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final + (1 - config.final) * cosine)


def cooling_rate(config: OptimConfig, step: int, first: int, last: int, peak: float) -> float:
    """Return the learning rate of `step` in a cool-down over steps [first, last).

    The decay is a cosine from `peak` to the final learning rate.
    """
    progress = (step - first) / max(1, last - first - 1)
    final = config.learning_rate * config.final
    return final + (max(peak, final) - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def adamw(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Return the optimizer of named parameters, grouped by weight decay and pace.

    Args:
        parameters: parameters by name; vectors have no weight decay.
        config: settings; a parameter that `paces` does not name has pace 1, a router `ROUTER_PACE`.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        usual = ROUTER_PACE if name.endswith(ROUTER) else 1.0
        pace = config.paces.get(name, usual)
        decays = parameter.dim() > 1
        settings = {"pace": pace, "lr": config.learning_rate * pace}
        if not decays:
            settings["weight_decay"] = 0.0
        group = groups.setdefault((decays, pace), {"params": [], **settings})
        group["params"].append(parameter)
    return torch.optim.AdamW(
        list(groups.values()),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )


def optimizer_tensors(
    optimizer: torch.optim.AdamW, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return moments and step counts as `<parameter>.<moment>`."""
    return {
        f"{name}.{moment}": value
        for name, parameter in parameters.items()
        for moment, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.AdamW, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Restore the tensors of `optimizer_tensors`."""
    for name, parameter in parameters.items():
        moments = {
            moment: tensors.get(f"{name}.{moment}") for moment in ("step", "exp_avg", "exp_avg_sq")
        }
        # AdamW keeps the step count on the CPU, and the moments on the parameter's device.
        optimizer.state[parameter] = {
            moment: value.clone() if moment == "step" else value.to(parameter.device, copy=True)
            for moment, value in moments.items()
            if value is not None
        }


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float) -> float:
    """Scale gradients down to `norm` and return their norm before; non-finite ones stay
    unscaled.
    """
    trained = list(parameters)
    total_norm = nn.utils.get_total_norm(p.grad for p in trained if p.grad is not None)
    if isinstance(total_norm, DTensor):  # parameters are sharded over processes
        total_norm = total_norm.full_tensor()
    if bool(total_norm.isfinite()):
        nn.utils.clip_grads_with_norm_(trained, norm, total_norm)
    return float(total_norm)


@dataclass(frozen=True)
class Weights:
    """Tensors of a trained model.

    Attributes:
        parameters: parameters by name.
        buffers: further tensors by name.
    """

    parameters: dict[str, nn.Parameter]
    buffers: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by a flat name."""
        return {
            **{f"parameter.{name}": parameter for name, parameter in self.parameters.items()},
            **{f"buffer.{name}": value for name, value in self.buffers.items()},
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Copy the values of `tensors` back."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
        for name, value in self.buffers.items():
            value.copy_(tensors[f"buffer.{name}"])


@dataclass(frozen=True)
class TrainingState(Weights):
    """Weights, optimizer state and random state.

    Attributes:
        optimizer: optimizer of the parameters.
    """

    optimizer: torch.optim.AdamW

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, including PyTorch's random states, by a flat name."""
        return {
            **super().tensors(),
            **{
                f"optimizer.{name}": v
                for name, v in optimizer_tensors(self.optimizer, self.parameters).items()
            },
            **{f"random.{device}": state for device, state in _random_states().items()},
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Copy the values of `tensors` back."""
        super().restore(tensors)
        load_optimizer_tensors(self.optimizer, self.parameters, _below(tensors, "optimizer."))
        _restore_random(_below(tensors, "random."))


def no_room_for(folder: Path) -> str:
    """Return the message for a checkpoint that does not fit on the disk."""
    return (
        f"The disk of {folder.parent} is full, the checkpoint {folder.name} was not written; "
        "the previous one is intact, so free some space and run the same command."
    )


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _random_states() -> dict[str, Tensor]:
    """Return the states of PyTorch's random generators by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {
            f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())
        }
    return states


def _restore_random(states: dict[str, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.device(device).index < torch.cuda.device_count():  # the run may have moved
            torch.cuda.set_rng_state(state, device)
