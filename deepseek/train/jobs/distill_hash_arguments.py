"""Arguments of hash distillation, declared as those of the other jobs (see `arguments.py`)."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from deepseek.train.jobs.declaration import DECLARED
from deepseek.train.jobs.limits import MAX_COUNT, MAX_LENGTH, BaseModelName
from deepseek.train.jobs.run_arguments import AnyPath, JobArguments


@dataclass(kw_only=True, frozen=True, config=DECLARED)
class DistillHashArguments(JobArguments):
    """Hash distillation"""

    lighter: ClassVar[str] = "a shorter --length"

    base: BaseModelName = Field(default="smollm2-135m", kw_only=False)
    """Base model: a known name, a folder, a GGUF file or a hub id"""

    data: tuple[str | Path, ...] = ()
    """Texts to learn from: folders, JSONL or Parquet files; default: the documentation and standard
    library of Python
    """

    texts: int = Field(default=6, ge=1, le=MAX_COUNT)
    """Number of texts"""

    length: int = Field(default=4096, ge=512, le=MAX_LENGTH)
    """Tokens per text"""

    buckets: int = Field(default=64, ge=2, le=MAX_LENGTH)
    """Key buckets per head; must equal the model's `lsh_num_buckets`"""

    window: int = Field(default=40, ge=1, le=MAX_LENGTH)
    """Keys that a query attends to in each bucket; the hash is fitted for so many, so give the model's
    `lsh_bucket_window`"""

    exact: int = Field(default=2, ge=0, le=1024)
    """Number of first layers that keep exact attention"""

    calibrate_only: bool = False
    """Cluster the keys, but don't train the probing"""

    out: AnyPath = None
    """File to write; default: beside the model"""

    dry_run: bool = False
    """Check the arguments and estimate memory and time, without changing anything"""
