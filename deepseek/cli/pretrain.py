"""`deepseek pretrain`: a tokenizer and a model from scratch."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)

Config = Annotated[Path, typer.Option("--config", help="YAML or TOML file; docs/pretraining.md lists its fields.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, estimate, change nothing.")]


@app.command()
def pretrain(config: Config, dry_run: DryRun = False) -> None:
    """Train from scratch on a weighted mix of texts; interrupted, the same command goes on where it was.

    Under `torchrun --nproc-per-node N -m deepseek pretrain ...` N processes share parameters, gradients and moments.
    """
    from deepseek.train.pretrain import pretrain as run

    folder = run(config, dry_run=dry_run, resume=shlex.join(["deepseek", *sys.argv[1:]]))
    if not dry_run:
        print(folder)
