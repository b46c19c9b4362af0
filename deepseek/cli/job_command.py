"""Build the command of a training job from the declaration of its arguments
(`train/jobs/arguments.py`).
"""

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from deepseek.cli.output import echo
from deepseek.cli.pull import fetch
from deepseek.errors import ConfigError
from deepseek.train.jobs.declaration import Argument, Declaration, arguments_of
from deepseek.train.jobs.yaml_file import read_mapping


def job_command(
    place: str, declaration: type[Declaration], summary: str, positional: str | None = None
) -> Callable[..., None]:
    """Return the command of a job, with one option per argument; it prints the path of the result.

    Options have no defaults of their own. Values missing on the command line are filled in by the
    declaration.

    Args:
        place: `module:function` below `deepseek.train.jobs`.
        declaration: the job's arguments.
        summary: description of the command in `--help`.
        positional: name of the argument that is given by position; default: none.
    """
    arguments = arguments_of(declaration)

    def command(**options: Any) -> None:
        from deepseek.device.choose import choose_device, choose_dtype

        values = {name: value for name, value in options.items() if value not in (None, [])}
        try:
            checked = declaration.read(**values)
        except ConfigError as error:
            raise ConfigError(_with_options(str(error), arguments)) from None
        if "device" in arguments:
            # Before a base is fetched, which can take minutes.
            device = choose_device(checked.device)  # type: ignore[attr-defined]
            choose_dtype(getattr(checked, "dtype", "auto"), device)
        if "base" in arguments and not getattr(checked, "update", ""):
            # Fetched here for the progress bar; the job would download without one.
            fetch(checked.base)  # type: ignore[attr-defined]
        module, _, function = place.partition(":")
        result = getattr(import_module(f"deepseek.train.jobs.{module}"), function)(**values)
        if not getattr(checked, "dry_run", False):
            echo(result)

    kind = Parameter.KEYWORD_ONLY
    annotations = {
        name: annotation(argument, declaration, name == positional)
        for name, argument in arguments.items()
    }
    parameters = [
        Parameter(name, kind, default=None, annotation=parameter_annotation)
        for name, parameter_annotation in annotations.items()
    ]
    command.__doc__ = summary
    command.__annotations__ = {**annotations, "return": None}
    command.__signature__ = Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    return command


def _with_options(message: str, names: Iterable[str]) -> str:
    """Return a message with the names of options in place of those of arguments.

    A message begins with the argument at fault; elsewhere only names with an underscore are told
    from ordinary words.
    """
    for name in names:
        option = f"--{name.replace('_', '-')}"
        message = re.sub(rf"^{name}(?=[ :=])", option, message)
        if "_" in name:
            message = re.sub(rf"\b{name}\b", option, message)
    return message


def annotation(argument: Argument, declaration: type[Declaration], positional: bool) -> Any:
    """Return Typer's annotation of an argument: its type on the command line and its help text.

    Args:
        argument: the declared argument.
        declaration: the job's arguments; inherited ones get a help panel of their own.
        positional: whether the argument is given by position.
    """
    if positional:
        return Annotated[str | None, typer.Argument(metavar="MODEL", help=argument.about)]
    option = f"--{argument.name.replace('_', '-')}"
    panel = None if argument.owner is declaration else argument.owner.__doc__
    about: dict[str, Any] = {"help": argument.about, "rich_help_panel": panel}
    if get_origin(argument.kind) is dict:
        return Annotated[Any, typer.Option(option, parser=read_mapping, metavar="YAML", **about)]
    return Annotated[_plain(argument.kind) | None, typer.Option(option, **about)]


def _plain(kind: Any) -> Any:
    """Return the type of an option: a list for several values, `Path` for what can be a file."""
    if get_origin(kind) is tuple:
        return list[_plain(get_args(kind)[0])]  # type: ignore[misc]
    return kind if kind in (int, float, bool, str) or get_origin(kind) is Literal else Path
