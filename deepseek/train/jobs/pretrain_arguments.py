"""Arguments of pre-training, declared like those of the other jobs in `arguments.py`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field
from pydantic.dataclasses import dataclass

from deepseek.errors import ConfigError, shown
from deepseek.terminal import is_unicode
from deepseek.train.jobs.declaration import DECLARED
from deepseek.train.jobs.limits import (
    MAX_COUNT,
    MAX_LENGTH,
    MAX_RATE,
    MAX_TOKENS,
    UNKNOWN_LICENCE,
    ModelName,
    ResultName,
    SpdxLicence,
)
from deepseek.train.jobs.run_arguments import AnyPath, RunArguments
from deepseek.train.jobs.settings import DomainSettings
from deepseek.train.jobs.yaml_file import read_file

if TYPE_CHECKING:
    from deepseek.model.config import ModelConfig


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class PretrainArguments(RunArguments):
    """Pre-training"""

    command: ClassVar[str] = "pretrain"

    lighter: ClassVar[str] = "fewer --batch-rows with more --accumulate, or a shorter --row-length"

    unstored: ClassVar[frozenset[str]] = RunArguments.unstored | {"config"}

    config: str | Path | Mapping[str, Any] | None = Field(default=None, kw_only=False)
    """YAML or TOML file (in Python also a mapping) with any of the arguments below; explicit
    arguments take precedence; default: none
    """

    name: ModelName = Field(default="", min_length=1)
    """Name of the model and of its run folder; there is no default"""

    domains: dict[ResultName, DomainSettings] = Field(
        default_factory=dict, min_length=1, examples=[{"code": {"folder": "src"}}]
    )
    """Text sources by name, each with `folder`, `git`, `jsonl` or `parquet`, and its `weight` in
    the mix; there is no default
    """

    tokens: int = Field(default=0, gt=0, le=MAX_TOKENS)
    """Total tokens to train on; there is no default"""

    model: dict[str, Any] = Field(
        default_factory=lambda: {"preset": "deepseek-nano"}, examples=[{"preset": "deepseek-29m"}]
    )
    """Model configuration: `preset` and fields of `ModelConfig`"""

    vocab_size: int = Field(default=8192, gt=0, le=1 << 21)
    """Vocabulary size of the tokenizer that is trained on the mix"""

    tokenizer: str | None = None
    """Model or folder to take the tokenizer from; default: train one"""

    row_length: int = Field(default=512, ge=2, le=MAX_LENGTH)
    """Tokens per packed row"""

    batch_rows: int = Field(default=8, ge=1, le=MAX_COUNT)
    """Rows per batch"""

    accumulate: int = Field(default=1, ge=1, le=MAX_COUNT)
    """Batches per optimizer step"""

    learning_rate: float = Field(default=3e-4, gt=0, le=MAX_RATE)
    """Peak learning rate"""

    final_learning_rate: float = Field(default=1e-5, ge=0, le=MAX_RATE)
    """Learning rate at the end of the cosine decay"""

    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises to its peak"""

    weight_decay: float = Field(default=0.1, ge=0, le=MAX_RATE)
    """Weight decay of AdamW"""

    curriculum: bool = False
    """Train on easy text first; saves steps with some seeds only (docs/log/pretraining.md)"""

    held_out: float = Field(default=0.05, gt=0, lt=1)
    """Share of the documents that is held out; the model never trains on them (the vocabulary of
    the tokenizer is chosen on all)"""

    held_out_tokens: int = Field(default=8192, ge=1, le=MAX_TOKENS)
    """Held-out tokens per domain to evaluate on"""

    evaluate_every: int = Field(default=100, ge=1, le=MAX_TOKENS)
    """Steps between evaluations"""

    checkpoint_every: int = Field(default=100, ge=1, le=MAX_TOKENS)
    """Steps between checkpoints"""

    samples: tuple[str, ...] = ("The ", "def ")
    """Prompts that the model continues after every evaluation"""

    licence: SpdxLicence = Field(default=UNKNOWN_LICENCE, max_length=200, examples=["MIT"])
    """Licence of the model, an SPDX expression"""

    out: AnyPath = None
    """Folder of the new model; default: `models/<name>` in the library's home"""

    @classmethod
    def read(cls, config: str | Path | Mapping[str, Any] | None = None, **given: Any) -> Self:
        """Return the arguments of a file or mapping, overridden by those that are `given` by name.

        Args:
            config: YAML or TOML file, or mapping; None: only `given`.
            given: arguments by name.

        Raises:
            ConfigError: an argument is wrong or missing; the message names it, and the file.
        """
        if not isinstance(config, str | Path | Mapping | None):
            raise ConfigError(
                f"config must be a file or a mapping, not {shown(config)}; give a YAML or TOML "
                "file."
            )
        if not isinstance(config, str | Path):
            return super().read(**{**(config or {}), **given})
        values = read_file(Path(config))
        try:
            return super().read(**{**values, **given})
        except ConfigError as error:
            raise ConfigError(f"{config}: {error}") from None

    def check(self) -> None:
        """Raise `ConfigError` if dtype, the model's configuration or a sample's text is wrong."""
        super().check()
        if self.model != {"preset": "deepseek-nano"}:
            context = self.model_config_for(self.vocab_size, 0).max_position_embeddings
            if self.row_length > context:
                raise ConfigError(
                    f"row_length={self.row_length} is impossible; the model has a context of "
                    f"{context} tokens: give at most that, or a larger max_position_embeddings."
                )
        for sample in self.samples:
            if not is_unicode(sample):
                raise ConfigError(f"samples: {shown(sample)} is no Unicode text.")
            if not sample:
                raise ConfigError("samples: a prompt is empty; give at least one character.")

    def text_paths(self) -> list[str | Path]:
        """Return the paths of all domains' texts."""
        domains = self.domains.values()
        return [path for domain in domains for path in domain.paths()]

    @property
    def steps(self) -> int:
        """Number of optimizer steps for `tokens`."""
        return max(1, round(self.tokens / (self.row_length * self.batch_rows * self.accumulate)))

    def model_config_for(self, vocab_size: int, end: int) -> "ModelConfig":
        """Return the model configuration.

        Args:
            vocab_size: entries of the vocabulary.
            end: id of the token that ends a document.
        """
        from deepseek.model.config import ModelConfig

        fields = {"max_position_embeddings": self.row_length, **self.model}
        preset = fields.pop("preset", None)
        fields |= {"vocab_size": vocab_size, "eos_token_id": end}
        return ModelConfig.preset(preset, **fields) if preset else ModelConfig(**fields)
