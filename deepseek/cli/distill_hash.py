"""`deepseek distill-hash`: fit the hashes of LSH attention to a model's attention."""

from deepseek.cli.job_command import job_command
from deepseek.train.jobs.distill_hash_arguments import DistillHashArguments

distill_hash = job_command(
    "distill_hash:distill_hash",
    DistillHashArguments,
    "Fit the hashes of LSH attention to the attention of a frozen model. "
    "If interrupted, the same command resumes it.",
)
