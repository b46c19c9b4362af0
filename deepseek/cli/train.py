"""`deepseek train`: run a recipe of several training stages."""

from pathlib import Path
from typing import Annotated

import typer

from deepseek.checkpoint.files import existing_path
from deepseek.cli.options import DryRun
from deepseek.cli.output import echo


def train(
    recipe: Annotated[
        Path, typer.Argument(help="YAML or TOML file; see docs/how-to/pretraining.md.")
    ],
    dry_run: DryRun = False,
) -> None:
    """Run the stages of a recipe in order. If interrupted, the same command resumes it."""
    recipe = existing_path(recipe)
    from deepseek.evaluate.stage import STAGE
    from deepseek.train.jobs.recipe import train_recipe

    folder = train_recipe(recipe, {"eval": STAGE}, dry_run=dry_run)
    if not dry_run:
        echo(folder)
