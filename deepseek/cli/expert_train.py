"""`deepseek expert train`: from a pile of text to an expert pack."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from deepseek.cli.pull import fetch
from deepseek.errors import ConfigError

Source = Annotated[Path | None, typer.Option(rich_help_panel="Text (at least one)")]


def train(
    from_git: Source = None,
    from_folder: Source = None,
    from_jsonl: Source = None,
    from_parquet: Source = None,
    name: Annotated[str, typer.Option(help="Name of the expert; default: that of the source.")] = "",
    base: Annotated[str, typer.Option(help="Base model: a name, a folder or a hub id.")] = "smollm2-135m",
    layers: Annotated[str, typer.Option(help="last:3 is fast, all is strong; also last:N or 0-9,20.")] = "last:3",
    width: Annotated[int | None, typer.Option(min=1, help="Width of the expert; default: by layers.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Training time; default: 5.")] = None,
    tokens: Annotated[int | None, typer.Option(min=0, help="Train on this many tokens instead; 0: all.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the text; default: by layers.")] = None,
    split: Annotated[
        Literal["file", "directory", "time"],
        typer.Option(help="How to hold text out; time: train on the past, test on what came later."),
    ] = "file",
    held_out: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of the text to hold out.")] = 0.1,
    licence: Annotated[str, typer.Option(help="SPDX expression for the pack.")] = "LicenseRef-Unknown",
    domain: Annotated[str, typer.Option(help="What the expert knows, in a few words.")] = "",
    seed: Annotated[int, typer.Option(help="Of initial values, order and split.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Pack file; default: the folder of trained experts.")] = None,
    run_folder: Annotated[Path | None, typer.Option(help="Where the run keeps its state and metrics.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, estimate, change nothing.")] = False,
) -> None:
    """Train an expert on your text with the base frozen; interrupted, the same command goes on where it was."""
    options = locals() | {"name": name or source_name(from_git, from_folder, from_jsonl, from_parquet)}
    from deepseek.train.expert import train_expert

    fetch(base)  # with a progress bar, where the library would fetch it in silence
    pack = train_expert(**options)
    if not dry_run:
        print(pack)


def source_name(*paths: Path | None) -> str:
    """Return a name for what is made from the first path given: `~/src/My Project` gives `My-Project`."""
    source = next((path for path in paths if path), None)
    if source is None:
        raise ConfigError("no text to learn from; give --from-git, --from-folder, --from-jsonl or --from-parquet.")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source.resolve().stem).strip("-._") or "expert"


def train_all(
    experts: Annotated[Path, typer.Argument(help="YAML or TOML file: `base` and, by name, `experts`.")],
) -> None:
    """Train many experts side by side as Ray tasks, and print each pack as it comes."""
    from deepseek.errors import TrainError
    from deepseek.train.expert_all import train_all as run

    failed = []
    for expert, result in run(experts):
        print(f"{expert}: {result}", flush=True)
        failed += [expert] if isinstance(result, Exception) else []
    if failed:
        raise TrainError(f"Of the experts {', '.join(failed)} failed; mend them and run the same command.")
