"""Experts trained in parallel equal those trained alone, and a failure does not stop the others."""

import json
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek.cli.main import main
from deepseek.errors import ConfigError, DataError
from deepseek.packs.pack import read_pack
from deepseek.train.jobs import many
from deepseek.train.jobs.expert import train_expert
from deepseek.train.jobs.many import estimate_all, train_all

DIALS: dict[str, Any] = {
    "layers": "last:1",
    "width": 24,
    "tokens": 3000,
    "epochs": 1,
    "row_length": 32,
    "held_out_tokens": 400,
}


class RayError(Exception):
    """Base class of Ray's errors."""


class RayTaskError(RayError):
    """Ray's error when the function of a task has raised `cause`."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class WorkerCrashedError(RayError):
    """Ray's error when the process of a task was killed."""


class FakeRay:
    """Ray as far as `train_all` needs it; a task runs when its result is asked for.

    Attributes:
        exceptions: Ray's exception classes.
        is_open: whether there is a session.
        cancelled: names of the cancelled tasks.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, is_open: bool) -> None:
        self.is_open = is_open
        self.cancelled: list[str] = []

    def is_initialized(self) -> bool:
        return self.is_open

    def init(self, **_: Any) -> None:
        self.is_open = True

    def shutdown(self) -> None:
        self.is_open = False

    def remote(self, **_: Any) -> Callable[[Callable[..., str]], Any]:
        def task(train: Callable[..., str]) -> Any:
            return SimpleNamespace(remote=lambda *arguments: (train, arguments[:2]))

        return task

    def wait(self, tasks: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return tasks[:num_returns], tasks[num_returns:]

    def get(self, task: tuple[Callable[..., str], tuple[str, str]]) -> str:
        train, (base, name) = task
        try:
            return train(base, name, {})
        except RayError:
            raise
        except Exception as error:
            raise RayTaskError(error) from None

    def cancel(self, task: tuple[Callable[..., str], tuple[str, str]]) -> None:
        self.cancelled.append(task[1][1])


def train_or_die(base: str, name: str, arguments: dict[str, Any]) -> str:
    """Replace the training of one expert."""
    if name == "hollow":
        raise DataError("no text")
    if name == "killed":
        raise WorkerCrashedError("the worker died")
    return f"{name}.pack"


@pytest.fixture
def experts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Four experts; the first two fail in different ways."""
    monkeypatch.setattr(many, "_train", train_or_die)
    return {"experts": {name: {} for name in ("hollow", "killed", "one", "two")}}


def test_an_expert_whose_process_is_killed_stops_no_other(
    experts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(is_open=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    results = dict(train_all(experts))
    assert isinstance(results["hollow"], DataError)
    assert isinstance(results["killed"], WorkerCrashedError)
    assert (results["one"], results["two"]) == (Path("one.pack"), Path("two.pack"))
    assert not ray.is_open, "its own session is ended"


def test_a_session_of_the_caller_stays_open_without_what_nobody_waits_for(
    experts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(is_open=True)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert len(list(train_all(experts))) == 4
    assert (ray.is_open, ray.cancelled) == (True, [])
    results = train_all(experts)
    assert isinstance(results, Generator)
    next(results)
    next(results)
    results.close()
    assert (ray.is_open, ray.cancelled) == (True, ["one", "two"])


@pytest.mark.slow
def test_experts_come_as_they_are_ready(tiny_base: Path, text_folder: Path, tmp_path: Path) -> None:
    def given(name: str, text: Path) -> dict[str, Any]:
        return {
            **DIALS,
            "from_folder": str(text),
            "out": str(tmp_path / f"{name}.pack"),
            "run_folder": str(tmp_path / name),
        }

    empty = tmp_path / "empty"
    empty.mkdir()
    experts = {
        "one": given("one", text_folder),
        "two": given("two", text_folder),
        "hollow": given("hollow", empty),
    }
    results = dict(train_all({"base": str(tiny_base), "experts": experts}))
    assert isinstance(results["hollow"], DataError) and "no usable text files" in str(
        results["hollow"]
    )
    alone = train_expert(
        str(tiny_base), **{**given("alone", text_folder), "name": "one", "quiet": True}
    )
    (one, two), by_itself = (
        (read_pack(Path(str(results[name]))) for name in ("one", "two")),
        read_pack(alone),
    )
    assert one.manifest.metrics == by_itself.manifest.metrics == two.manifest.metrics


def test_a_dry_run_estimates_each_expert_without_ray(
    tiny_base: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = {
        name: {
            **DIALS,
            "from_folder": str(text_folder),
            "out": str(tmp_path / f"{name}.pack"),
            "run_folder": str(tmp_path / name),
        }
        for name in ("one", "two")
    }
    file = tmp_path / "experts.json"
    file.write_text(json.dumps({"base": str(tiny_base), "experts": experts}))
    experts_file = file.rename(file.with_suffix(".yaml"))  # JSON is YAML
    with pytest.raises(SystemExit) as stop:
        main(["expert", "train-all", str(experts_file), "--dry-run"])
    output = capsys.readouterr()
    assert (stop.value.code or 0, output.out) == (0, "")
    assert output.err.count("memory") == 2
    assert output.err.index("one:") < output.err.index("two:")
    assert [path.name for path in tmp_path.iterdir()] == ["experts.yaml"]
    del experts["two"]["from_folder"]
    with pytest.raises(DataError, match=r"experts\.two: No text is given"):
        estimate_all({"base": str(tiny_base), "experts": experts})


@pytest.mark.parametrize("same", ["name", "run_folder"])
def test_two_experts_in_one_place_are_refused(same: str, text_folder: Path, tmp_path: Path) -> None:
    place = "x" if same == "name" else str(tmp_path / "x")
    arguments = {"from_folder": str(text_folder), same: place}
    with pytest.raises(ConfigError, match=r"experts\.two: It is trained in .*x as one is"):
        estimate_all({"experts": {"one": arguments, "two": arguments}})


def test_a_file_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="experts: "):
        next(train_all({"experts": {}}))
