"""`deepseek pull`: fetch a base model."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

app = typer.Typer(add_completion=False)


@app.command()
def pull(
    name: Annotated[
        str, typer.Argument(help="A known model (smollm2-135m) or a hub id (owner/name).")
    ] = "smollm2-135m",
) -> None:
    """Fetch a base model into the local cache; interrupted, the same command goes on where it was."""
    print(fetch(name))


def fetch(name: str) -> Path:
    """Return the folder of a model, showing progress on standard error if it has to be fetched first."""
    from deepseek.checkpoint import hub

    console = Console(stderr=True)
    if not console.is_terminal:
        return hub.resolve(name, _Lines(name))
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(name, total=1.0)
        return hub.resolve(name, lambda what, part: bar.update(task, description=f"{name}: {what}", completed=part))


class _Lines:
    """Progress where there is no terminal: one line for each thing that is begun."""

    def __init__(self, name: str) -> None:
        self.name, self.what = name, ""

    def __call__(self, what: str, part: float) -> None:
        if what != self.what:
            self.what = what
            print(f"{self.name}: {what}", file=sys.stderr, flush=True)
