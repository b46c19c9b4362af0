"""`deepseek distill-hash`: fit the hashes of LSH attention to a model's own attention."""

from deepseek.cli.job_command import job_command
from deepseek.train.jobs.arguments import DistillHashArguments

distill_hash = job_command(
    "distill_hash:distill_hash",
    DistillHashArguments,
    "Learn which keys a frozen model's heads look for; interrupted, the same command goes on where it was.",
)
