"""`deepseek watch`: keep an expert current with its source."""

import os
from typing import Annotated

import typer

from deepseek.cli.output import echo


def watch(
    name: Annotated[str, typer.Argument(help="Name of a trained expert.")],
    server: Annotated[
        str, typer.Option(help="Address of a server to plug every new state into; default: none.")
    ] = "",
    minutes: Annotated[
        float, typer.Option(min=0.01, max=1e4, help="Time budget of an update, in minutes.")
    ] = 1.0,
    every: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds between two looks at the source.")
    ] = 30.0,
) -> None:
    """Update an expert whenever its repository, folder or file has changed, until Ctrl-C.

    The server's admin key is read from DEEPSEEK_ADMIN_KEY.
    """
    from deepseek.train.jobs.expert_server import ExpertServer
    from deepseek.train.jobs.watch import watch_expert

    live = ExpertServer(server, os.environ.get("DEEPSEEK_ADMIN_KEY", "")) if server else None
    watch_expert(name, live, minutes=minutes, every=every, say=lambda text: echo(text, error=True))
