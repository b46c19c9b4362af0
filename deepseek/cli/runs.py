"""`deepseek runs`: list, show, compare and remove training runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepseek.cli.options import Json, Yes, usable_home
from deepseek.cli.output import echo, figures_table, plain, print_table
from deepseek.cli.units import with_unit

if TYPE_CHECKING:
    from deepseek.cli.shapes import RunRow

app = typer.Typer(add_completion=False, help="List, show, compare and remove training runs.")

Name = Annotated[str, typer.Argument(help="Name or folder of a run.")]


@app.command("list")
def list_runs(as_json: Json = False) -> None:
    """List the runs of this user."""
    from deepseek.checkpoint.store import home
    from deepseek.cli.shapes import RunList, print_json
    from deepseek.errors import UserError

    usable_home()
    rows = []
    for name, folder in _runs().items():
        try:
            rows.append(_row(name, folder))
        except (UserError, OSError) as error:
            rows.append(_damaged_row(name, folder, error))
    if as_json:
        print_json(RunList(runs=rows))
        return
    if not rows:
        echo(f"no runs in {home() / 'runs'}; every training command writes one")
    width = max([28, *(len(row.name) + 2 for row in rows)])
    for row in rows:
        loss = row.figures.get("held_out_loss", row.figures.get("after"))
        result = f"held-out loss {loss:.4f}" if isinstance(loss, float) else row.problem or ""
        echo(f"{row.name:{width}}{row.state:12}{result}".rstrip())


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Print the folder, state and figures of a run."""
    from deepseek.cli.shapes import print_json
    from deepseek.train.loop.past_runs import find_run

    row = _row(name, find_run(name))
    if as_json:
        print_json(row)
        return
    echo(row.path)
    for key, value in {"state": row.state, **row.figures}.items():
        echo(f"{key:28}{with_unit(key, value)}")


@app.command()
def compare(first: Name, second: Name, as_json: Json = False) -> None:
    """Print the figures of two runs side by side."""
    from deepseek.cli.shapes import RunList, print_json
    from deepseek.train.loop.past_runs import find_run

    rows = [_row(name, find_run(name)) for name in (first, second)]
    if as_json:
        print_json(RunList(runs=rows))
        return
    left, right = ({"state": row.state, **row.figures} for row in rows)
    table = figures_table("", (first, second))
    for key in dict.fromkeys([*left, *right]):
        cells = (
            with_unit(key, figures[key]) if key in figures else "" for figures in (left, right)
        )
        table.add_row(plain(key), *(plain(cell) for cell in cells))
    print_table(table)


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="Name of the run, as `runs list` shows it.")],
    yes: Yes = False,
) -> None:
    """Remove a run from the library's home, after a question that says what is lost. The model or
    the expert that it made stays.
    """
    from deepseek.checkpoint.files import folder_bytes
    from deepseek.checkpoint.output import remove_folder
    from deepseek.cli.confirm import confirm
    from deepseek.cli.units import size
    from deepseek.train.loop.run_lock import run_lock

    folder = _stored_run(name)
    loss = _loss_with(name, folder)
    confirm(f"Remove {folder} ({size(folder_bytes(folder))})?{loss}", yes)
    if loss and yes:  # else the question has said it
        echo(f"warning:{loss}", error=True)
    with run_lock(folder):
        remove_folder(folder)
    echo(f"removed {folder}")


def _stored_run(name: str) -> Path:
    """Return the folder of a run in the library's home.

    Raises:
        DataError: there is no such run.
    """
    from deepseek.checkpoint.store import home
    from deepseek.errors import DataError
    from deepseek.registry import nearest

    runs = _runs()
    if name not in runs:
        mend = nearest(name, runs) if runs else "none has been started"
        raise DataError(f"There is no run {name!r} in {home() / 'runs'}; {mend}.")
    return runs[name]


def _runs() -> dict[str, Path]:
    """Return the run folders in the library's home by name, without what is being removed."""
    from deepseek.train.loop.past_runs import all_runs

    return {name: folder for name, folder in all_runs().items() if not name.startswith(".")}


def _loss_with(name: str, folder: Path) -> str:
    """Return a sentence, after a blank, about what a run is needed for; "": nothing."""
    from deepseek.packs.library import installed

    if not (folder / "result.json").is_file():
        return " It is unfinished, and what it has done is lost."
    if name in installed():
        return (
            f" Without it, the expert {name} cannot be updated, merged, indexed, or evaluated on "
            "its held-out text."
        )
    return ""


def _row(name: str, folder: Path) -> "RunRow":
    """Return what a list says of a run."""
    from deepseek.cli.shapes import RunRow
    from deepseek.train.loop.past_runs import summary

    figures = summary(folder)
    state = figures.pop("state")
    return RunRow(name=name, path=str(folder), state=state, figures=figures)


def _damaged_row(name: str, folder: Path, error: Exception) -> "RunRow":
    """Return what a list says of a run whose files cannot be read."""
    from deepseek.cli.shapes import RunRow

    return RunRow(name=name, path=str(folder), state="damaged", problem=str(error))
