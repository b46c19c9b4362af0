"""Arguments of device and precision, declared like those of the jobs in `arguments.py`."""

from typing import Any, ClassVar, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from deepseek.device.names import ABOUT_DEVICE, ABOUT_DTYPE, DEVICE, DEVICES, Dtype
from deepseek.errors import ConfigError
from deepseek.train.jobs.declaration import DECLARED, Declaration

AUTO_DTYPE = ("dtype", "auto")


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class DeviceArguments(Declaration):
    """Device"""

    unstored: ClassVar[frozenset[str]] = Declaration.unstored | {"device"}

    device: str = Field(
        default="auto", pattern=DEVICE, examples=list(DEVICES), description=ABOUT_DEVICE
    )


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class PrecisionArguments(DeviceArguments):
    """Precision"""

    dtypes: ClassVar[frozenset[Dtype]] = frozenset(get_args(Dtype))
    """Values of `dtype` that the job supports."""

    dtype: Dtype = Field(default="auto", description=ABOUT_DTYPE)

    def check(self) -> None:
        """Raise `ConfigError` if the job cannot compute in `dtype`."""
        if self.dtype not in self.dtypes:
            supported = " or ".join(sorted(self.dtypes - {"auto"}))
            raise ConfigError(f"dtype={self.dtype} has too small a range here; take {supported}.")

    def as_json(self) -> dict[str, Any]:
        """Return the arguments that decide the result; "auto" is left out, so that runs from before
        this argument can be resumed.
        """
        stored = super().as_json()
        return {name: value for name, value in stored.items() if (name, value) != AUTO_DTYPE}
