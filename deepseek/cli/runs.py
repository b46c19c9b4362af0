"""`deepseek runs`: list, show and compare training runs."""

from typing import Annotated

import typer

from deepseek.cli.output import echo, plain

app = typer.Typer(add_completion=False, help="List, show and compare training runs.")

Name = Annotated[str, typer.Argument(help="Name or folder of a run.")]


@app.command("list")
def list_runs() -> None:
    """List the runs of this user."""
    from deepseek.errors import UserError
    from deepseek.train.loop.runs import all_runs, summary

    for name, folder in all_runs().items():
        try:
            figures = summary(folder)
        except (UserError, OSError) as error:
            echo(f"{name:28}{'damaged':12}{error}")
            continue
        loss = figures.get("held_out_loss", figures.get("after"))
        result = f"held-out loss {loss:.4f}" if isinstance(loss, float) else ""
        echo(f"{name:28}{figures['state']:12}{result}".rstrip())


@app.command()
def show(name: Name) -> None:
    """Print the folder, state and figures of a run."""
    from deepseek.train.loop.runs import find_run, summary

    folder = find_run(name)
    echo(folder)
    for key, value in summary(folder).items():
        echo(f"{key:28}{value}")


@app.command()
def compare(first: Name, second: Name) -> None:
    """Print the figures of two runs side by side."""
    from rich.console import Console
    from rich.table import Table

    from deepseek.train.loop.runs import find_run, summary

    left = summary(find_run(first))
    right = summary(find_run(second))
    table = Table()
    for heading in ("", first, second):
        table.add_column(plain(heading))
    for key in dict.fromkeys([*left, *right]):
        table.add_row(plain(key), plain(left.get(key, "")), plain(right.get(key, "")))
    Console().print(table)
