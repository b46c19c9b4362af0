"""`deepseek pretrain`: a tokenizer and a model from scratch."""

from deepseek.cli.job_command import job_command
from deepseek.train.jobs.pretrain_arguments import PretrainArguments

pretrain = job_command(
    "pretrain:pretrain",
    PretrainArguments,
    """Train from scratch on a weighted mix of texts; interrupted, the same command goes on where it was.

    Under `torchrun --nproc-per-node N -m deepseek pretrain ...` N processes share parameters, gradients and moments.
    """,
)
