"""`deepseek align`: make a model answer as preferred."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def align(
    base: Annotated[str, typer.Argument(metavar="MODEL", help="A known name, a folder or a hub id.")] = "smollm2-135m",
    prefs: Annotated[Path | None, typer.Option(help="The preference database; default: the library's own.")] = None,
    method: Annotated[Literal["ppo", "dpo", "rloo"], typer.Option(help="ppo: RLPO; others: by TRL.")] = "ppo",
    reward: Annotated[
        str, typer.Option(help="model (fitted to the pairs) or a judge: clean, willing, varied.")
    ] = "model",
    name: Annotated[str, typer.Option(help="Name of the new model.")] = "aligned",
    layers: Annotated[str, typer.Option(help="What is trained: last:N or all.")] = "last:6",
    rollouts: Annotated[int, typer.Option(min=1, help="How often the model answers prompts and learns.")] = 40,
    rollout_size: Annotated[int, typer.Option(min=1, help="Prompts answered each time.")] = 48,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="The peak.")] = 5e-5,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.1, help="At which answers are sampled.")] = 0.8,
    target_kl: Annotated[float, typer.Option(min=0.01, help="Distance to keep to the base, nats an answer.")] = 8.0,
    seed: Annotated[int, typer.Option(help="Of order and sampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the new model.")] = None,
    run_folder: Annotated[Path | None, typer.Option(help="Where the run keeps its state and metrics.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, change nothing.")] = False,
) -> None:
    """Align a model with preferences; interrupted, the same command goes on where it was."""
    options = locals()
    from deepseek.checkpoint.store import home
    from deepseek.cli.pull import fetch
    from deepseek.train.jobs.align import align as run

    fetch(base)
    folder = run(**options | {"prefs": prefs or home() / "preferences.db"})
    if not dry_run:
        print(folder)
