"""Schedule and optimizer state."""

from typing import Any

import pytest
import torch
from torch import nn

from deepseek.errors import ConfigError
from deepseek.train.loop.optim import OptimConfig, adamw, clip_gradients, learning_rate


def test_schedule_rises_to_the_peak_once_and_ends_at_its_final_share() -> None:
    config = OptimConfig(learning_rate=1e-3, warmup=0.1, final=0.05)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(1e-3)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(
        rates[peak:], reverse=True
    )
    assert rates[0] == pytest.approx(1e-4) and rates[-1] == pytest.approx(5e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedule_of_the_shortest_runs_is_positive_and_bounded(steps: int) -> None:
    config = OptimConfig(learning_rate=1e-3)
    assert all(0 < learning_rate(config, step, steps) <= 1e-3 for step in range(steps))


def test_only_matrices_decay() -> None:
    parameters = {"matrix": nn.Parameter(torch.ones(2, 2)), "vector": nn.Parameter(torch.ones(2))}
    optimizer = adamw(parameters, OptimConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (parameters["matrix"] < 1).all() and (parameters["vector"] == 1).all()


def test_a_named_parameter_has_its_own_pace() -> None:
    parameters = {
        name: nn.Parameter(torch.zeros(2, 2)) for name in ("fast", "slow", "router.weight")
    }
    optimizer = adamw(
        parameters, OptimConfig(learning_rate=0.1, weight_decay=0.0, paces={"slow": 0.01})
    )
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    steps = {name: float(-parameter.detach()[0, 0]) for name, parameter in parameters.items()}
    assert steps == pytest.approx({"fast": 0.1, "slow": 0.001, "router.weight": 0.01})
    assert sorted(group["pace"] for group in optimizer.param_groups) == [0.01, 0.1, 1.0]


@pytest.mark.parametrize("paces", [{"slow": -1.0}, {"slow": "x"}, {1: 1.0}, [1.0]], ids=str)
def test_paces_are_shares(paces: Any) -> None:
    with pytest.raises(ConfigError, match="paces"):
        OptimConfig(learning_rate=0.1, paces=paces)


def test_clipping_bounds_the_norm_and_reports_the_one_before() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    assert clip_gradients([parameter], 1.0) == pytest.approx(6.0)
    assert float(parameter.grad.norm()) == pytest.approx(1.0, rel=1e-4)


def test_a_non_finite_gradient_is_reported() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, float("inf")])
    assert not clip_gradients([parameter], 1.0) < float("inf")
