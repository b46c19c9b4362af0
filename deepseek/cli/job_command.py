"""The command of a training job, its options made of the declaration of its arguments in
`train/jobs/arguments.py`.
"""

from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml

from deepseek.cli.pull import fetch
from deepseek.errors import ConfigError
from deepseek.train.jobs.declaration import Argument, Declaration, arguments_of


def job_command(
    place: str, declaration: type[Declaration], summary: str, positional: str | None = None
) -> Callable[..., None]:
    """Return the command of a job: an option for each of its arguments, and the path of what it
    made on the output.

    Options have no defaults of their own: what is not given on the command line is left to the
    declaration.

    Args:
        place: `module:function` below `deepseek.train.jobs`.
        declaration: the job's arguments.
        summary: what `--help` says of the command; default: nothing else.
        positional: name of the argument that stands without an option name; default: none.
    """
    arguments = arguments_of(declaration)

    def command(**options: Any) -> None:
        given = {name: value for name, value in options.items() if value not in (None, [])}
        checked = declaration.read(**given)
        if "base" in arguments:
            fetch(checked.base)  # type: ignore[attr-defined]  # with a progress bar; the library would be silent
        module, _, function = place.partition(":")
        made = getattr(import_module(f"deepseek.train.jobs.{module}"), function)(**given)
        if not getattr(checked, "dry_run", False):
            print(made)

    kind = Parameter.KEYWORD_ONLY
    annotations = {
        name: annotation(argument, declaration, name == positional)
        for name, argument in arguments.items()
    }
    parameters = [
        Parameter(name, kind, default=None, annotation=found) for name, found in annotations.items()
    ]
    command.__doc__ = summary
    command.__annotations__ = {**annotations, "return": None}
    command.__signature__ = Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    return command


def annotation(argument: Argument, declaration: type[Declaration], positional: bool) -> Any:
    """Return what Typer takes for an argument: its type on the command line, and the text of
    `--help`.
    """
    if positional:
        return Annotated[str | None, typer.Argument(metavar="MODEL", help=argument.about)]
    option = f"--{argument.name.replace('_', '-')}"
    panel = None if argument.owner is declaration else argument.owner.__doc__
    about: dict[str, Any] = {"help": argument.about, "rich_help_panel": panel}
    if get_origin(argument.kind) is dict:
        return Annotated[Any, typer.Option(option, parser=_mapping, metavar="YAML", **about)]
    return Annotated[_plain(argument.kind) | None, typer.Option(option, **about)]


def _plain(kind: Any) -> Any:
    """Return the type of an option: of several values a list, of what may be a file its path."""
    if get_origin(kind) is tuple:
        return list[_plain(get_args(kind)[0])]  # type: ignore[misc]
    return kind if kind in (int, float, bool, str) or get_origin(kind) is Literal else Path


def _mapping(text: str) -> dict[str, Any]:
    """Return a mapping that is written as YAML on the command line."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{text!r} is no mapping; write it as '{{name: value}}'.")
    return value
