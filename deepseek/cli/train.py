"""`deepseek train`: a recipe of several stages."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[
        Path, typer.Argument(help="YAML or TOML file; docs/how-to/pretraining.md shows one.")
    ],
) -> None:
    """Run the stages of a recipe in order; interrupted, the same command goes on where it was."""
    from deepseek.evaluate.stage import STAGE
    from deepseek.train.jobs.recipe import train_recipe

    print(train_recipe(recipe, {"eval": STAGE}))
