"""Resolved arguments of a training on text, with all defaults filled in."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass as declaration
from transformers import AutoConfig

from deepseek.checkpoint.files import located
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home, read_object
from deepseek.model.attached.load import UNREADABLE
from deepseek.model.config import ModelConfig
from deepseek.model.language_model import is_own
from deepseek.model.pretrained import read_config
from deepseek.train.jobs.arguments import TextArguments
from deepseek.train.jobs.declaration import DECLARED
from deepseek.train.jobs.plan import TrainingPlan

ROW_LENGTH = 512
"""Default number of tokens per row, if the base's context has as many."""

LITTLE_TEXT = 40_000
"""Distinct tokens below which a high learning rate fits the training text and little else."""


@declaration(kw_only=True, frozen=True, config=DECLARED)
class TextRequest(TextArguments):
    """Resolved arguments of a training on text, stored as `request.json`.

    Attributes:
        learning_rate: peak learning rate.
        little_text_rate: the same for fewer than `LITTLE_TEXT` distinct tokens; 0: the same rate.
        little_text_passes: minimum passes over little text at which its rate applies.
    """

    little_text_passes: ClassVar[float] = 0.0

    row_length: int
    batch_rows: int
    learning_rate: float
    little_text_rate: float = 0.0

    def peak_rate(self, plan: TrainingPlan) -> float:
        """Return the peak learning rate of a plan."""
        is_little = plan.rows * self.row_length < LITTLE_TEXT
        passes = plan.steps * self.batch_rows / plan.rows
        if self.little_text_rate and is_little and passes >= self.little_text_passes:
            return self.little_text_rate
        return self.learning_rate

    def as_json(self) -> dict[str, Any]:
        """Return the arguments as JSON values. The rate for little text is left out, so that runs
        from before it can be resumed.
        """
        values = super().as_json()
        del values["little_text_rate"]
        return values


def row_length_for(arguments: TextArguments) -> int:
    """Return the requested tokens per row, or the default, at most the base's context.

    A run begun by an earlier version with rows longer than the context keeps their length.
    """
    if arguments.row_length is not None:
        return arguments.row_length
    run_folder = located(arguments.run_folder or home() / "runs" / arguments.named())
    begun = run_folder / "request.json"
    if begun.is_file() and read_object(begun).get("row_length") == ROW_LENGTH:
        return ROW_LENGTH
    return min(ROW_LENGTH, context_in(resolve(arguments.base)))


def context_in(folder: Path) -> int:
    """Return the context of the model in a folder, in tokens, without loading its weights.

    Raises:
        CheckpointError: the family is unknown.
    """
    if is_own(read_object(folder / "config.json")):
        return ModelConfig(**read_config(folder)).max_position_embeddings
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except UNREADABLE:
        return ROW_LENGTH  # loading the model reports the error
    text_config = config.get_text_config(decoder=True)
    return int(getattr(text_config, "max_position_embeddings", None) or ROW_LENGTH)
