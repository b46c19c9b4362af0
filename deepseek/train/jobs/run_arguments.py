"""Arguments of every job and of its run, declared like those of the jobs in `arguments.py`."""

from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from deepseek.checkpoint.files import existing_path, located, writable_file, writable_folder
from deepseek.device.names import Dtype
from deepseek.train.jobs.declaration import DECLARED
from deepseek.train.jobs.device_arguments import DeviceArguments, PrecisionArguments
from deepseek.train.jobs.limits import MAX_SEED
from deepseek.train.loop.run_folder import refuse_other_result, with_absolute_models

AnyPath = str | Path | None


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class JobArguments(DeviceArguments):
    """Every job"""

    command: ClassVar[str] = ""
    """Command of a job that writes a run folder, for the message when another one's holds it."""

    lighter: ClassVar[str] = "a smaller model"
    """What needs less memory, for the message when a device has too little."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of initial values, order, sampling and split"""

    quiet: bool = False
    """Show no progress"""


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class RunArguments(JobArguments, PrecisionArguments):
    """Run"""

    # Without loss scaling, gradients vanish in fp16.
    dtypes: ClassVar[frozenset[Dtype]] = frozenset(get_args(Dtype)) - {"float16"}

    run_folder: AnyPath = None
    """Folder of the run's state and metrics; default: `runs/<name>` in the library's home"""

    dry_run: bool = False
    """Check the arguments and estimate memory and time, without changing anything"""

    makes_file: ClassVar[bool] = False

    def check_paths(self) -> None:
        """Raise `UserError` if a text is missing, or run folder or result cannot be written.

        A recipe calls this for all stages before the first one runs for hours.
        """
        for path in self.text_paths():
            existing_path(located(path))
        if self.run_folder:
            writable_folder(located(self.run_folder))
        out: AnyPath = getattr(self, "out", None)
        if out and self.makes_file:
            writable_file(located(out))
        elif out:
            writable_folder(located(out), mark="config.json")
        if out and self.run_folder:
            refuse_other_result(located(self.run_folder), located(out))

    def text_paths(self) -> list[str | Path]:
        """Return the files and folders that the job reads."""
        return []

    def as_json(self) -> dict[str, Any]:
        """Return the arguments that decide the result, with absolute paths for local models."""
        return with_absolute_models(super().as_json())
