"""`deepseek adapt`: fine-tune a model on your text."""

from deepseek.cli.job_command import job_command
from deepseek.train.jobs.arguments import AdaptArguments

adapt = job_command(
    "adapt:adapt",
    AdaptArguments,
    "Fine-tune a model on your text. If interrupted, the same command resumes it.",
    positional="base",
)
