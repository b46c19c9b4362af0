"""`deepseek align`: make a model answer as preferred."""

from deepseek.cli.job_command import job_command
from deepseek.train.jobs.arguments import AlignArguments

align = job_command(
    "align:align",
    AlignArguments,
    "Align a model with preferences; interrupted, the same command goes on where it was.",
    positional="base",
)
