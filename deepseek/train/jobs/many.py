"""Train many experts in parallel, each as one Ray task, on this machine or on a cluster."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from deepseek.checkpoint.files import located
from deepseek.errors import ConfigError, UserError
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.cluster import connect
from deepseek.train.jobs.expert import train_expert
from deepseek.train.jobs.settings import JobSettings
from deepseek.train.loop.progress import say


class ExpertsSettings(JobSettings):
    """Configuration file of `deepseek expert train-all`.

    Attributes:
        base: base model of all experts.
        cpus: processors per task; Ray runs as many tasks at once as fit.
        experts: arguments of `deepseek.train_expert` (see `ExpertArguments`) by the expert's name.
    """

    base: str = "smollm2-135m"
    cpus: int = Field(default=1, gt=0, le=4096)
    experts: dict[str, dict[str, Any]] = Field(min_length=1)


def train_all(config: str | Path | Mapping[str, Any]) -> Iterator[tuple[str, Path | Exception]]:
    """Yield (name, pack or exception) as trainings finish. The same call resumes interrupted ones.

    A Ray session that the caller has opened is used and left open.

    Args:
        config: YAML or TOML file, or mapping; see `ExpertsSettings`.

    Raises:
        ConfigError: Ray is missing, or an argument of any expert is wrong.
    """
    settings = _checked_settings(config)
    is_callers_session = _is_session_open()
    ray = connect("Training in parallel")
    task = ray.remote(num_cpus=settings.cpus, max_retries=3)(_train)
    names = {
        task.remote(settings.base, name, arguments): name
        for name, arguments in settings.experts.items()
    }
    pending = list(names)
    try:
        while pending:
            (done, *_), pending = ray.wait(pending, num_returns=1)
            yield names[done], _result(ray, done)
    finally:
        if is_callers_session:
            for training in pending:  # the session stays open, so its tasks would go on
                ray.cancel(training)
        else:
            ray.shutdown()


def estimate_all(config: str | Path | Mapping[str, Any]) -> None:
    """Print the estimate of each expert as if trained alone; in parallel, they share the machine.

    Args:
        config: as for `train_all`.

    Raises:
        UserError: an argument or the text of an expert is wrong; the message names it.
    """
    settings = _checked_settings(config)
    for name, arguments in settings.experts.items():
        say(f"{name}:")
        given = {"base": settings.base, "name": name, **arguments}
        with _named(name):
            train_expert(**{**given, "dry_run": True})


def _checked_settings(config: str | Path | Mapping[str, Any]) -> ExpertsSettings:
    """Return the settings, after checking the arguments of every expert.

    Raises:
        ConfigError: an argument is wrong, or two experts have the same name or run folder.
    """
    settings = ExpertsSettings.read(config)
    places: dict[str, str] = {}
    for name, arguments in settings.experts.items():
        with _named(name):
            read = ExpertArguments.read(**{"base": settings.base, "name": name, **arguments})
            read.check_paths()
            place = str(located(read.run_folder)) if read.run_folder else str(read.name)
            if place in places:
                raise ConfigError(f"It is trained in {place} as {places[place]} is; change one.")
            places[place] = name
    return settings


def _is_session_open() -> bool:
    """Return whether this process has an open Ray session; does not import Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _result(ray: Any, training: Any) -> Path | Exception:
    """Return the pack of a finished training, or the exception that ended it.

    Args:
        ray: module of Ray.
        training: reference to the result of the task.
    """
    try:
        return Path(ray.get(training))
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    except ray.exceptions.RayError as error:  # its process was killed, or its machine is gone
        return error


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Prefix the message of a `UserError` with the name of the expert."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"experts.{name}: {error}") from None


def _train(base: str, name: str, arguments: dict[str, Any]) -> str:
    return str(train_expert(**{"base": base, "name": name, "quiet": True, **arguments}))
