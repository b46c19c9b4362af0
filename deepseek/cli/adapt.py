"""`deepseek adapt`: fine-tune a model on your text."""

from deepseek.cli.job_command import job_command
from deepseek.train.jobs.arguments import AdaptArguments

adapt = job_command(
    "adapt:adapt",
    AdaptArguments,
    "Adapt a model to your text; interrupted, the same command goes on where it was.",
    positional="base",
)
