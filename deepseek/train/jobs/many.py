"""Many experts at once: each is trained alone, so each is one task of Ray, on this machine or on a
cluster.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from deepseek.errors import ConfigError
from deepseek.train.jobs.arguments import ExpertArguments
from deepseek.train.jobs.cluster import connect
from deepseek.train.jobs.expert import train_expert
from deepseek.train.jobs.settings import JobSettings


class ExpertsSettings(JobSettings):
    """What `deepseek expert train-all` reads.

    Attributes:
        base: model of all experts.
        cpus: processors of each task; as many tasks run at once as fit the machine or the cluster.
        experts: by name, the arguments of `deepseek.train_expert` (see `ExpertArguments`).
    """

    base: str = "smollm2-135m"
    cpus: int = Field(default=1, gt=0)
    experts: dict[str, dict[str, Any]] = Field(min_length=1)


def train_all(config: str | Path | Mapping[str, Any]) -> Iterator[tuple[str, Path | Exception]]:
    """Yield (name, pack or what went wrong) as the trainings end; the same call goes on after an
    interruption.

    Raises `ConfigError` if Ray is missing, or an argument of any expert is wrong.
    """
    settings = ExpertsSettings.read(config)
    for name, given in settings.experts.items():
        try:
            ExpertArguments.read(**{"base": settings.base, "name": name, **given})
        except ConfigError as error:
            raise ConfigError(f"experts.{name}: {error}") from None
    ray = connect("Training in parallel")
    task = ray.remote(num_cpus=settings.cpus, max_retries=3)(_train)
    names = {
        task.remote(settings.base, name, given): name for name, given in settings.experts.items()
    }
    left = list(names)
    try:
        while left:
            (done, *_), left = ray.wait(left, num_returns=1)
            try:
                yield names[done], Path(ray.get(done))
            except ray.exceptions.RayTaskError as error:
                yield names[done], error.cause if isinstance(error.cause, Exception) else error
    finally:
        ray.shutdown()


def _train(base: str, name: str, given: dict[str, Any]) -> str:
    return str(train_expert(**{"base": base, "name": name, "quiet": True, **given}))
