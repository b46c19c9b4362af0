"""Configuration files in YAML or TOML, read into frozen objects."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepseek.errors import ConfigError
from deepseek.terminal import visible
from deepseek.train.jobs.declaration import unknown
from deepseek.train.jobs.yaml_file import read_file

if TYPE_CHECKING:
    from deepseek.train.text.corpus import Source


class JobSettings(BaseModel):
    """Base class of the contents of a configuration file; subclasses declare the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """Reject unknown keys and suggest the nearest field."""
        names = {field.alias or name for name, field in cls.model_fields.items()}
        for key in values if isinstance(values, Mapping) else ():
            if key not in names:
                raise ValueError(unknown(str(key), names))
        return values

    @classmethod
    def read(cls, given: str | Path | Mapping[str, Any] | Self) -> Self:
        """Return validated settings.

        Args:
            given: a file, a mapping, or settings, which are returned unchanged.

        Raises:
            ConfigError: the file or a field is invalid.
        """
        if isinstance(given, cls):
            return given
        where = f"{given}: " if isinstance(given, str | Path) else ""
        try:
            return cls.model_validate(
                read_file(Path(given)) if isinstance(given, str | Path) else given
            )
        except ValidationError as error:
            raise ConfigError(f"{where}{_explain(error)}.") from None


def _explain(error: ValidationError) -> str:
    """Return the first mistake in a configuration file, with the path of its field, in one line."""
    from deepseek.packs.manifest import explain

    mistake = error.errors(include_url=False, include_input=False)[0]
    if mistake["type"] == "missing":
        field = ".".join(map(str, mistake["loc"]))
        return f"{visible(field)} is missing; give it"
    return explain(error, whole="")


class TextSettings(JobSettings):
    """Text sources: any of a folder, a git history, JSONL and Parquet files."""

    folder: Path | None = None
    git: Path | None = None
    jsonl: Path | None = None
    parquet: Path | None = None

    def paths(self) -> list[Path]:
        """Return the paths that are given."""
        return [path for path in (self.folder, self.git, self.jsonl, self.parquet) if path]

    def source(self, held_out: float, seed: int) -> "Source":
        """Return the source of the text.

        Args:
            held_out: share of the documents to hold out.
            seed: seed of the split.
        """
        from deepseek.train.text.corpus import Source

        return Source.at(
            self.git, self.folder, self.jsonl, self.parquet, held_out=held_out, seed=seed
        )


class DomainSettings(TextSettings):
    """One domain of the mix, with its weight relative to the other domains."""

    weight: float = Field(default=1.0, gt=0, strict=True)
