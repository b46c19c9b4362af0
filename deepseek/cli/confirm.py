"""Ask before something is removed."""

import sys

import typer

from deepseek.errors import ConfigError
from deepseek.terminal import visible


def confirm(question: str, yes: bool) -> None:
    """Ask on the terminal whether to go on; end the command if not.

    Args:
        question: what would happen, in one or more sentences.
        yes: the option `--yes`: do not ask.

    Raises:
        ConfigError: nobody can answer, since standard input is no terminal.
        KeyboardInterrupt: the answer is Ctrl-C or Ctrl-D.
    """
    if yes:
        return
    question = visible(question)
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Nobody is here to confirm it; add --yes.")
    try:
        is_confirmed = typer.confirm(question, err=True)
    except typer.Abort:
        typer.echo(err=True)  # ends the line of the question
        raise KeyboardInterrupt from None
    if not is_confirmed:
        typer.echo("nothing is changed", err=True)
        raise typer.Exit(1)
