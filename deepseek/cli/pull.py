"""`deepseek pull`: fetch a base model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from deepseek.cli.options import refuse_ignored
from deepseek.cli.output import echo


def pull(
    name: Annotated[
        str,
        typer.Argument(help="smollm2-135m, gemma3-270m, a GGUF file, or a hub id (owner/name)."),
    ] = "smollm2-135m",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Type of the weights out of a GGUF file; default: the one that keeps every value."
        ),
    ] = None,
) -> None:
    """Fetch a base model into the local cache, or convert a GGUF file into it; print its licence
    and its folder. If interrupted, the same command resumes it.
    """
    from deepseek.checkpoint.hub import names_file
    from deepseek.checkpoint.licence import read_licence

    if not names_file(name):
        refuse_ignored("goes with a GGUF file", dtype=dtype)
    folder = fetch(name, dtype)
    licence = read_licence(folder)
    if not licence.restricted:  # `fetch` has said it already
        echo(f"{name}: {licence}", error=True)
    echo(folder)


def fetch(name: str, dtype: str | None = None) -> Path:
    """Return the folder of a model; if it has to be fetched, show progress on standard error.

    A licence with use restrictions is shown there, too, whenever such a model is used.

    Args:
        name: a known name, a folder, a GGUF file or a hub id.
        dtype: dtype of the weights out of a GGUF file; default: the one that keeps every value.
    """
    from deepseek.checkpoint import hub
    from deepseek.checkpoint.licence import read_licence
    from deepseek.train.loop.progress import ProgressBar

    with ProgressBar() as progress:
        folder = hub.pull(name, progress, dtype) if dtype else hub.resolve(name, progress)
    licence = read_licence(folder)
    if licence.restricted:
        echo(f"{name}: {licence}", error=True)
    return folder
