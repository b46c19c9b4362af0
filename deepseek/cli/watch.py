"""`deepseek watch`: keep an expert current with its source."""

from typing import Annotated

import typer

from deepseek.cli.expert_live import running
from deepseek.cli.options import Device, Key, Precision
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
    device: Device = "auto",
    dtype: Precision = "auto",
    key: Key = None,
) -> None:
    """Update an expert whenever its repository, folder or file has changed, until Ctrl-C.

    A signed pack needs --key to be signed again. The server's admin key is read from
    DEEPSEEK_ADMIN_KEY.
    """
    from deepseek.train.jobs.watch import watch_expert

    watch_expert(
        name,
        running(server) if server else None,
        minutes=minutes,
        every=every,
        say=lambda text: echo(text, error=True),
        device=device,
        dtype=dtype,
        key=key,
    )
