"""`deepseek align`: align a model with preferences."""

from deepseek.cli.job_command import job_command
from deepseek.train.jobs.arguments import AlignArguments

align = job_command(
    "align:align",
    AlignArguments,
    "Align a model with preferences. If interrupted, the same command resumes it; dpo and rloo "
    "start again.",
    positional="base",
)
