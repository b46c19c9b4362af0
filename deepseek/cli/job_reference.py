"""Generate the reference of all job arguments, `docs/reference/arguments.md`, from the
declarations.

Run `python -m deepseek.cli.job_reference docs/reference/arguments.md` to update it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from deepseek.evaluate.stage import EvaluationArguments
from deepseek.train.jobs.arguments import AdaptArguments, AlignArguments, ExpertArguments
from deepseek.train.jobs.declaration import Argument, Declaration, arguments_of
from deepseek.train.jobs.distill_hash_arguments import DistillHashArguments
from deepseek.train.jobs.pretrain_arguments import PretrainArguments


@dataclass(frozen=True)
class PublicJob:
    """The public names of a job.

    Attributes:
        arguments: the declaration of its arguments.
        stage: its name in a recipe; None if it cannot be a stage.
        function: its name in `deepseek`; None if it is only a stage.
        command: its words on the command line; None if it is only a stage.
    """

    arguments: type[Declaration]
    stage: str | None
    function: str | None = None
    command: str | None = None


JOBS = (
    PublicJob(ExpertArguments, "expert", "train_expert", "expert train"),
    PublicJob(AdaptArguments, "adapt", "adapt", "adapt"),
    PublicJob(AlignArguments, "align", "align", "align"),
    PublicJob(PretrainArguments, "pretrain", "pretrain", "pretrain"),
    PublicJob(DistillHashArguments, None, "distill_hash", "distill-hash"),
    PublicJob(EvaluationArguments, "eval"),
)

PAGE_HEADER = """# Arguments of the training jobs

An argument has one name everywhere: `learning_rate` in Python and in recipes is `--learning-rate` on the command line.
In Python `base` (of `pretrain`: `config`) may be given by position. A wrong value or a misspelt name stops the job
before anything is loaded.

This page is written by `python -m deepseek.cli.job_reference docs/reference/arguments.md`; do not edit it.
"""


def page() -> str:
    """Return the page: one section per job, one table per group of arguments."""
    return "\n".join([PAGE_HEADER, *(section(job) for job in JOBS)])


def section(job: PublicJob) -> str:
    """Return the section of one job."""
    places = [f"`deepseek.{job.function}`, `deepseek {job.command}`"] if job.function else []
    places += [f"Stage `{job.stage}` of a recipe"] if job.stage else []
    lines = [f"## {job.command or job.stage}", "", f"{'. '.join(places)}.", ""]
    owner: type[Declaration] | None = None
    for argument in arguments_of(job.arguments).values():
        if argument.owner is not owner:
            lines += [] if owner is None else [""]
            lines += [f"| {argument.owner.__doc__} | type | |", "|---|---|---|"]
            owner = argument.owner
        lines.append(
            f"| `{argument.name}` | {shown_kind(argument)} | {argument.about.replace('|', chr(92) + '|')} |"
        )
    return "\n".join([*lines, ""])


def shown_kind(argument: Argument) -> str:
    """Return the type of an argument in plain words."""
    if argument.choices:
        return ", ".join(f"`{choice}`" for choice in argument.choices)
    if get_origin(argument.kind) is tuple:
        return f"several {_word(get_args(argument.kind)[0])}s"
    return _word(argument.kind)


def _word(kind: Any) -> str:
    words = {bool: "yes or no", dict: "mapping", float: "number", int: "whole number", str: "text"}
    return words.get(get_origin(kind) or kind, "path")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
