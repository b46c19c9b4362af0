"""`deepseek pull`: fetch a base model."""

from pathlib import Path
from typing import Annotated

import typer


def pull(
    name: Annotated[
        str, typer.Argument(help="A known name, or a hub id (owner/name).")
    ] = "smollm2-135m",
) -> None:
    """Fetch a base model into the local cache and print its folder. If interrupted, the same
    command resumes it.
    """
    print(fetch(name))


def fetch(name: str) -> Path:
    """Return the folder of a model; if it has to be fetched, show progress on standard error.

    Args:
        name: a known name, a folder or a hub id.
    """
    from deepseek.checkpoint.hub import resolve
    from deepseek.train.loop.progress import ProgressBar

    with ProgressBar() as progress:
        return resolve(name, progress)
