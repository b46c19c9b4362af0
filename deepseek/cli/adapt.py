"""`deepseek adapt`: fine-tune a model on your text."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from deepseek.cli.expert import Source, source_name
from deepseek.cli.pretrain import DryRun


def adapt(
    base: Annotated[str, typer.Argument(metavar="MODEL", help="A known name, a folder or a hub id.")] = "smollm2-135m",
    from_git: Source = None,
    from_folder: Source = None,
    from_jsonl: Source = None,
    from_parquet: Source = None,
    mode: Annotated[
        Literal["last-n", "lora", "full", "expert"],
        typer.Option(help="What trains: the last layers, adapters, everything, or a module beside the model."),
    ] = "last-n",
    last: Annotated[int, typer.Option(min=1, help="Layers that last-n trains.")] = 3,
    name: Annotated[str, typer.Option(help="Name of the new model; default: that of the source.")] = "",
    tokens: Annotated[int, typer.Option(min=0, help="Distinct tokens to train on; 0: all.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over them.")] = 2,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="The peak; default: by mode.")] = None,
    held_out: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of the text to hold out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of order and split.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the new model.")] = None,
    run_folder: Annotated[Path | None, typer.Option(help="Where the run keeps its state and metrics.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Adapt a model to your text; interrupted, the same command goes on where it was."""
    options = locals() | {"name": name or source_name(from_git, from_folder, from_jsonl, from_parquet)}
    from deepseek.cli.pull import fetch
    from deepseek.train.jobs.adapt import adapt as run

    fetch(base)
    folder = run(**options)
    if not dry_run:
        print(folder)
