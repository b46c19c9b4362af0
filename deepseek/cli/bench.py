"""`deepseek bench`: run one of the repository's benchmarks."""

import os
from pathlib import Path
from typing import Annotated

import typer

from deepseek.claims.child import run_python
from deepseek.errors import UserError
from deepseek.registry import pick

app = typer.Typer(add_completion=False)

FOLDER = Path(__file__).parents[2] / "benchmarks"
"""Benchmarks are not part of the wheel, since their baselines and input texts are not either."""

ALIASES = {
    "attention": "attention_scaling",
    "positions": "position_length",
    "prefill": "decode",
    "serve": "batch",
}


def measurements() -> dict[str, str]:
    """Return name -> first sentence of its docstring for every benchmark in the checkout."""
    sources = {file.stem: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.py")}
    lines = {
        name: " ".join(text.strip('"').partition("\n\n")[0].split()).partition(". ")[0].strip('".')
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
        str, typer.Argument(help="Name of the benchmark; without a name, all are listed.")
    ] = "",
) -> None:
    """Run a benchmark; everything after its name is passed on to it:
    `deepseek bench attention --help`.
    """
    descriptions = measurements()
    if not descriptions:
        raise UserError(
            "the benchmarks are not part of the installed package; "
            "run this in a clone of the repository."
        )
    if name == "--json":
        from deepseek.cli.shapes import BenchmarkList, BenchmarkRow, print_json

        rows = [BenchmarkRow(name=name, about=line) for name, line in sorted(descriptions.items())]
        print_json(BenchmarkList(benchmarks=rows))
        return
    if name in ("", "--help", "-h"):
        typer.echo(
            "usage: deepseek bench NAME [OPTIONS]\n       deepseek bench --json\n\nmeasurements:"
        )
        for measurement, line in sorted(descriptions.items()):
            typer.echo(f"  {measurement:20}{line}")
        return
    pick(descriptions, name, "measurement")
    script = FOLDER / f"{ALIASES.get(name, name)}.py"
    raise typer.Exit(run_python([str(script), *context.args], Path.cwd(), os.environ))
