"""`deepseek pretrain`: a tokenizer and a model from scratch."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    Path, typer.Option("--config", help="YAML or TOML file; docs/how-to/pretraining.md lists its fields.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, estimate, change nothing.")]


def pretrain(config: Config, dry_run: DryRun = False) -> None:
    """Train from scratch on a weighted mix of texts; interrupted, the same command goes on where it was.

    Under `torchrun --nproc-per-node N -m deepseek pretrain ...` N processes share parameters, gradients and moments.
    """
    from deepseek.train.jobs.pretrain import pretrain as run

    folder = run(config, dry_run=dry_run)
    if not dry_run:
        print(folder)
