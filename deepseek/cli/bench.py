"""`deepseek bench`: run a measurement of this repository."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from deepseek.errors import UserError
from deepseek.registry import pick

app = typer.Typer(add_completion=False)

FOLDER = Path(__file__).parents[2] / "benchmarks"
"""Measurements are no part of the wheel: what they compare with, and the text that they read, is
not either.
"""

ALIASES = {
    "attention": "attention_scaling",
    "positions": "position_length",
    "prefill": "decode",
    "serve": "batch",
}


def measurements() -> dict[str, str]:
    """Return name -> the first line of its description, of every measurement in the checkout."""
    sources = {file.stem: file.read_text() for file in FOLDER.glob("*.py")}
    lines = {
        name: text.partition("\n")[0].strip('"')
        for name, text in sources.items()
        if "def main(" in text
    }
    return lines | {alias: lines[name] for alias, name in ALIASES.items() if name in lines}


@app.command(
    "bench",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def bench(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help="Which measurement; without a name they are listed.")
    ] = "",
) -> None:
    """Run a measurement; all that follows its name is handed on:
    `deepseek bench attention --help`.
    """
    known = measurements()
    if not known:
        raise UserError(
            "the benchmarks are not part of the installed package; run this in a clone of the repository."
        )
    if name in ("", "--help"):
        typer.echo("usage: deepseek bench NAME [OPTIONS]\n\nmeasurements:")
        for one, line in sorted(known.items()):
            typer.echo(f"  {one:20}{line}")
        return
    pick(known, name, "measurement")
    script = FOLDER / f"{ALIASES.get(name, name)}.py"
    raise typer.Exit(
        subprocess.run([sys.executable, script, *context.args], check=False).returncode
    )
