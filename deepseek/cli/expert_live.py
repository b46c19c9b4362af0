"""`deepseek expert plug` and `deepseek expert unplug`: change the experts of a running server."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from deepseek.cli.output import echo

if TYPE_CHECKING:
    from deepseek.train.jobs.expert_server import ExpertServer

Name = Annotated[str, typer.Argument(help="Name of an expert in the server's folder of packs.")]
Server = Annotated[str, typer.Option(help="Address of the server.")]

USUAL_SERVER = "http://127.0.0.1:8000"
"""Where `deepseek serve` listens unless told otherwise."""


def plug(name: Name, server: Server = USUAL_SERVER) -> None:
    """Plug an expert into a running server; requests that start from now on can use it.

    The server's admin key is read from DEEPSEEK_ADMIN_KEY.
    """
    running(server).plug(name)
    echo(f"{name} is plugged")


def unplug(name: Name, server: Server = USUAL_SERVER) -> None:
    """Unplug an expert from a running server; replies under way finish with it.

    The server's admin key is read from DEEPSEEK_ADMIN_KEY.
    """
    running(server).unplug(name)
    echo(f"{name} is unplugged")


def running(address: str) -> "ExpertServer":
    """Return the server at an address, with the admin key of the environment.

    Args:
        address: such as `http://127.0.0.1:8000`.

    Raises:
        ConfigError: the address is none.
    """
    from deepseek.train.jobs.expert_server import ExpertServer

    return ExpertServer(address, os.environ.get("DEEPSEEK_ADMIN_KEY", ""))
