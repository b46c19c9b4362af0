"""`deepseek claims`: the article's claims, what was measured, and whether they are reached."""

from collections import Counter
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from deepseek.claims.declaration import CHECKOUT, read_declaration
from deepseek.claims.evaluation import ClaimRow, ClaimTable, MeasuredFigure, claim_table
from deepseek.cli.options import Json
from deepseek.cli.output import echo, plain, print_table
from deepseek.errors import ConfigError, UserError
from deepseek.registry import pick

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(add_completion=False, help="The article's claims and what was measured.")

Name = Annotated[str, typer.Argument(help="Name of a claim.")]

COLOURS = {"reached": "green", "partly": "yellow", "missed": "red", "not run": "dim"}

QUICK_NOTE = "quick: tiny models and few steps, to see that the commands work; no figure is kept"


@app.callback(invoke_without_command=True)
def table(context: typer.Context, as_json: Json = False) -> None:
    """Print the claims, what was measured for each, and whether they are reached."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise ConfigError(
                "--json belongs behind show; write `deepseek claims show NAME --json`."
            )
        return
    overview = claim_table(CHECKOUT)
    if as_json:
        from deepseek.cli.shapes import print_json

        print_json(overview)
        return
    _print_table(overview)


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Print a claim with its protocol, both sides, machines, commits and commands."""
    overview = claim_table(CHECKOUT)
    row = pick({row.name: row for row in overview.claims}, name, "claim")
    if as_json:
        from deepseek.cli.shapes import print_json

        print_json(row)
        return
    echo(f"{row.name}: {row.says}", f"[{state(row)}]")
    for heading, text in (
        ("protocol", row.protocol),
        ("reached when", row.reached_when),
        ("why", row.why),
        ("log", row.log and f"docs/{row.log}"),
    ):
        if text:
            echo(f"  {heading}: {text}")
    for entry in row.attempts:
        echo(f"  attempt: docs/log/{entry.replace('#', '.md#', 1)}")
    for figure in row.figures:
        echo()
        for line in figure_lines(figure):
            echo(line)


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="Name of a claim, or all.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny models and few steps; no figure is kept.")
    ] = False,
) -> None:
    """Run the benchmarks of a claim, or of all whose results are missing or stale.

    Ctrl-C stops at a safe point; finished results stay.
    """
    from deepseek.claims.history import History
    from deepseek.claims.runs import (
        Places,
        check_corpora,
        due_results,
        left_out,
        quick_commands,
        run_commands,
        run_quick_commands,
        used_results,
    )

    declaration = read_declaration(CHECKOUT)
    rows_by_name = {row.name: row for row in claim_table(CHECKOUT).claims}
    is_all = name == "all"
    rows = list(rows_by_name.values()) if is_all else [pick(rows_by_name, name, "claim")]
    only_stale = is_all and not quick
    results = due_results(declaration, rows, quick, only_stale)
    by_hand = {} if quick else left_out(declaration, rows, only_stale)
    if not results and not (is_all or quick):
        raise UserError(_by_hand(by_hand))
    if by_hand:
        _say(_by_hand(by_hand))
    if not results:
        echo("nothing to run: every other result is up to date")
        return
    if not quick:
        places = Places.of_user(CHECKOUT)
        history = History(CHECKOUT)
        commands = {}
        for result in results:
            command = declaration.results[result].command
            version = history.version(declaration.results[result].measures, command)
            commands[result] = places.filled_in(command, result, version)
        check_corpora(commands.values(), places.corpora)
        _report(run_commands(commands, CHECKOUT, _say))
        return
    with TemporaryDirectory(prefix="deepseek-quick-") as folder:
        _say(QUICK_NOTE)
        claim_results = set(
            chain.from_iterable(used_results(declaration, row.name) for row in rows)
        )
        without_quick = sorted(
            result for result in claim_results if not declaration.results[result].quick
        )
        if without_quick:
            _say(f"without a quick command: {', '.join(without_quick)}")
        places = Places.below(Path(folder))
        tiny_commands = dict(quick_commands(declaration, results, places))
        _report(run_quick_commands(tiny_commands, CHECKOUT, Path(folder), _say))


def _say(line: str) -> None:
    echo(line, error=True)


def _by_hand(results: dict[str, str]) -> str:
    """Return what is to be said of results without a command of their own."""
    commands = ", ".join(f"{name} (`{command}`)" for name, command in results.items())
    return (
        f"not run, because no command fetches all that it takes (see docs/claims.md): {commands}; "
        "run it with your own paths."
    )


def _report(failed_names: list[str]) -> None:
    if failed_names:
        raise UserError(
            f"{', '.join(failed_names)} failed; see the messages above, then run it again."
        )


def state(row: ClaimRow) -> str:
    """Return the state of a claim in words."""
    staleness = {True: ", stale", False: "", None: ", staleness unknown"}[row.stale]
    return f"{row.state}{staleness}"


def figure_lines(figure: MeasuredFigure) -> list[str]:
    """Return a figure with its circumstances, a line each."""
    verdict = {True: "met", False: "not met", None: ""}[figure.met]
    goal = f"wanted {figure.goal}" if figure.goal else ""
    measured = figure.text or f"not run ({figure.unmeasured})"
    facts = [measured, figure.spread and f"over {figure.spread}", goal, verdict]
    lines = [f"{figure.what}: {'; '.join(fact for fact in facts if fact)}"]
    if figure.theirs:
        lines.append(f"  ours {figure.ours}; {figure.rival} {figure.theirs}")
    if figure.test:
        lines.append(f"  {figure.test}")
    source = figure.source
    if source:
        lines.append(f"  {source.machine}; commit {source.commit}; {source.date}")
        lines.append(f"  {source.command}")
        if source.changed is None:
            lines.append("  unknown whether it is stale: its commit is not in this repository")
        elif source.changed:
            lines.append(f"  stale, changed since: {', '.join(source.changed)}")
    return lines


def _print_table(overview: ClaimTable) -> None:
    from rich.table import Table

    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for width in (26, 14, None):
        grid.add_column(width=width, overflow="fold")
    for row in overview.claims:
        grid.add_row(
            plain(row.name, "bold"), plain(state(row), COLOURS[row.state]), plain(row.says)
        )
        for figure in row.figures:
            if figure.goal:
                _add_figure(grid, figure)
    print_table(grid)
    echo()
    counts = Counter[str](row.state for row in overview.claims)
    echo(f"{len(overview.claims)} claims:", ", ".join(f"{counts[name]} {name}" for name in COLOURS))
    if overview.commit is None:
        echo("Unknown which results are older than the code: this is no git repository.")
    else:
        stale = sum(row.stale is True for row in overview.claims)
        echo(f"{stale} stale: code that they measure differs at {overview.commit}.")
    echo("`deepseek claims show NAME`: protocol, machine, commit, command, and why.")


def _add_figure(grid: "Table", figure: MeasuredFigure) -> None:
    """Add a figure below its claim: the figure, what is wanted, and what it is of which sides."""
    sides = f": {figure.ours}; {figure.rival} {figure.theirs}" if figure.theirs else ""
    style = {True: "", False: "red", None: "dim"}[figure.met]
    cells = (f"  {figure.text or 'not run'}", figure.goal, f"{figure.what}{sides}")
    grid.add_row(*(plain(cell, style) for cell in cells))
