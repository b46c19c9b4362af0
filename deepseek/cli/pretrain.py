"""`deepseek pretrain`: train a tokenizer and a model from scratch."""

from deepseek.cli.job_command import job_command
from deepseek.train.jobs.pretrain_arguments import PretrainArguments

pretrain = job_command(
    "pretrain:pretrain",
    PretrainArguments,
    """Train from scratch on a weighted mix of texts. If interrupted, the same command resumes it.

    Under `torchrun --nproc-per-node N -m deepseek pretrain ...`, parameters, gradients and
    optimizer moments are sharded over N processes.
    """,
)
