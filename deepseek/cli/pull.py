"""`deepseek pull`: fetch a base model."""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

app = typer.Typer(add_completion=False)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A known model (smollm2-135m) or a hub id (owner/name).")] = "smollm2-135m",
) -> None:
    """Fetch a base model into the local cache; interrupted, the same command goes on where it was."""
    from deepseek.checkpoint import hub

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        folder = hub.pull(name, lambda what, part: bar.update(task, description=what, completed=part))
    print(folder)
