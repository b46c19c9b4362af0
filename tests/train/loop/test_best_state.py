"""The best state of a run: found, stored, restored with the same bits after any interruption, and
never worse than the start.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from train.loop.tiny_run import Numbers, Overfitting, Regression, config

from deepseek.train.loop.loop import Hooks, LossOutput, TrainResult, train
from deepseek.train.loop.metrics import read_metrics
from deepseek.train.loop.progress import ProgressBar

STEPS = 40
GUARD: dict[str, Any] = {"keep_best": "held_out_loss", "evaluate_every": 2, "checkpoint_every": 5}


def run(folder: Path, task: Regression, hooks: Hooks | None = None, **changes: Any) -> TrainResult:
    loop = config(STEPS, **{**GUARD, **changes})
    return train(task, Numbers(), loop, folder, progress=ProgressBar(quiet=True), hooks=hooks)


def held_out(folder: Path) -> list[float]:
    return [
        record["held_out_loss"]
        for record in read_metrics(folder / "metrics.jsonl")
        if "held_out_loss" in record
    ]


def test_a_run_that_overfits_ends_with_its_best_state(tmp_path: Path) -> None:
    task = Overfitting()
    result = run(tmp_path, task)
    losses = held_out(tmp_path)
    assert losses[-1] > min(losses), "the run is no test if it does not overfit"
    assert result.metrics == task.evaluate() == {"held_out_loss": min(losses)}
    assert (
        result.position.best_step == 2 * losses.index(min(losses)) and result.position.step == STEPS
    )
    assert [folder.name for folder in (tmp_path / "best").iterdir()] == [
        f"step-{result.position.best_step:08d}"
    ]


def test_it_goes_back_once_cools_down_and_stops(tmp_path: Path) -> None:
    task = Overfitting()
    result = run(tmp_path, task, patience=3, cooldown=0.5)
    first, last = result.position.cooling
    assert result.position.step == last < STEPS
    rates = {
        record["step"]: record["learning_rate"]
        for record in read_metrics(tmp_path / "metrics.jsonl")
        if "loss" in record
    }
    falling = [rates[step] for step in range(first, last)]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.1 * rates[first - 1]
    assert result.metrics == task.evaluate() == {"held_out_loss": min(held_out(tmp_path))}


class Hopeless(Regression):
    """A task in which every step makes the loss worse."""

    def evaluate(self) -> dict[str, float]:
        with torch.no_grad():
            pairs = zip(self.parameters.values(), START, strict=True)
            return {
                "held_out_loss": float(sum((now - before).abs().sum() for now, before in pairs))
            }


START = [parameter.detach().clone() for parameter in Regression().parameters.values()]


def test_without_any_gain_the_start_is_given_back_and_time_is_not_wasted(tmp_path: Path) -> None:
    task = Hopeless()
    result = run(tmp_path, task, patience=3)
    assert (result.position.best_step, result.position.step) == (0, STEPS / 2)
    assert all(torch.equal(p, q) for p, q in zip(task.parameters.values(), START, strict=True))


class BetterLater(Hopeless):
    """A task that is worse than its start until step `better`."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.better, self.made = step, 0

    def loss(self, batch: torch.Tensor, step: int) -> LossOutput:
        self.made = step + 1
        return super().loss(batch, step)

    def evaluate(self) -> dict[str, float]:
        worse = 1.0 if 0 < self.made < self.better else 0.0
        return {"held_out_loss": 1.0 + worse - self.made / STEPS}


@pytest.mark.parametrize("step", [4, 8, 18])
def test_first_steps_that_harm_do_not_end_a_run(tmp_path: Path, step: int) -> None:
    task = BetterLater(step)
    result = run(tmp_path, task, patience=3)
    assert result.position.best_step == STEPS


class KilledError(Exception):
    """Simulates SIGKILL: nothing is written after it."""


@pytest.mark.parametrize("kill", [1, 7, 13, 15])
@pytest.mark.parametrize("patience", [0, 3])
def test_killed_and_started_again_gives_the_same_best_bits(
    tmp_path: Path, kill: int, patience: int
) -> None:
    whole, again = Overfitting(), Overfitting()
    expected = run(tmp_path / "whole", whole, patience=patience)
    steps = 0

    def stepped(_: float) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps == min(kill, expected.position.step):
            raise KilledError
        return {}

    with pytest.raises(KilledError):
        run(tmp_path / "killed", Overfitting(), Hooks(stepped=stepped), patience=patience)
    assert run(tmp_path / "killed", again, patience=patience) == expected
    assert all(torch.equal(p, whole.parameters[name]) for name, p in again.parameters.items())
    assert held_out(tmp_path / "killed") == held_out(tmp_path / "whole")


class BestAt(Regression):
    """Regression whose held-out loss is lowest after `best` batches, two per step."""

    def __init__(self, best: int) -> None:
        super().__init__()
        self.best, self.made = best, 0

    def loss(self, batch: torch.Tensor, step: int) -> LossOutput:
        self.made = step + 1  # also in a resumed run
        return super().loss(batch, step)

    def evaluate(self) -> dict[str, float]:
        return {"held_out_loss": 1.0 + abs(self.made - self.best)}


def test_steps_that_are_made_again_may_have_another_best_state(tmp_path: Path) -> None:
    """As on another device: a best state from after the last checkpoint is then invalid."""

    def killed(_: float) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps == 9:
            raise KilledError
        return {}

    steps = 0
    with pytest.raises(KilledError):
        run(tmp_path, BestAt(16), Hooks(stepped=killed))
    assert max(path.name for path in (tmp_path / "best").iterdir()) == "step-00000008"
    assert run(tmp_path, BestAt(8)).position.best_step < 8


def test_a_finished_run_gives_its_best_state_again(tmp_path: Path) -> None:
    first, again = Overfitting(), Overfitting()
    result = run(tmp_path, first, patience=3)
    losses = held_out(tmp_path)
    assert run(tmp_path, again, patience=3) == result
    assert held_out(tmp_path) == losses
    assert all(torch.equal(p, first.parameters[name]) for name, p in again.parameters.items())


def test_best_states_of_a_run_without_a_checkpoint_are_those_of_no_run(tmp_path: Path) -> None:
    """Killed before its first checkpoint, a run starts again and may have another best state."""
    for leftover in ("step-00000039", ".step-00000038.tmp"):
        (tmp_path / "best" / leftover).mkdir(parents=True)
    task = Overfitting()
    result = run(tmp_path, task)
    assert [folder.name for folder in (tmp_path / "best").iterdir()] == [
        f"step-{result.position.best_step:08d}"
    ]
    assert result.metrics == task.evaluate()
