"""Build the command of a training job from the declaration of its arguments
(`train/jobs/arguments.py`).
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from deepseek.checkpoint.hub import is_to_download
from deepseek.cli.messages import about_options
from deepseek.cli.output import echo
from deepseek.cli.pull import fetch
from deepseek.cli.repository import refuse_address
from deepseek.errors import ConfigError
from deepseek.train.jobs.declaration import Argument, Declaration, arguments_of
from deepseek.train.jobs.yaml_file import read_mapping

METAVAR = "MODEL"
"""What help texts call the argument that is given by position."""

BY_OPTION = "by_option"
"""Parameter of a command for that argument, given by its option."""


def job_command(
    place: str,
    declaration: type[Declaration],
    summary: str,
    positional: str | None = None,
    extra_options: Mapping[str, Any] | None = None,
) -> Callable[..., None]:
    """Return the command of a job, with one option per argument; it prints the path of the result.

    Options have no defaults of their own. Values missing on the command line are filled in by the
    declaration.

    Args:
        place: `module:function` below `deepseek.train.jobs`.
        declaration: the job's arguments.
        summary: description of the command in `--help`.
        positional: name of the argument that is given by position or by its option; default: none.
        extra_options: options that are no arguments of the job, such as what is done with its
            result, by the name that the function has for them, with Typer's annotations; default:
            none.
    """
    arguments = arguments_of(declaration)
    option_names = {name: option_name(name) for name in arguments}

    def command(**options: Any) -> None:
        values = {name: value for name, value in options.items() if value not in (None, [])}
        extra_values = {name: values.pop(name) for name in extra_options or {} if name in values}
        if BY_OPTION in values:
            if positional in values:
                raise ConfigError(
                    f"{METAVAR} and {option_names[str(positional)]} are the same argument; give "
                    "one."
                )
            values[str(positional)] = values.pop(BY_OPTION)
        refuse_address(values.get("from_git"))
        with about_options(option_names):
            job_arguments = declaration.read(**values)
        if "device" in arguments:
            from deepseek.device.choose import choose_device, choose_dtype

            # Before a base is fetched, which can take minutes.
            device = choose_device(job_arguments.device)  # type: ignore[attr-defined]
            choose_dtype(getattr(job_arguments, "dtype", "auto"), device)
        if "base" in arguments and not getattr(job_arguments, "update", ""):
            base: str = job_arguments.base  # type: ignore[attr-defined]
            if is_to_download(base):
                job_arguments.check_paths()
            # Fetched here for the progress bar; the job would download without one.
            fetch(base)
        module, _, function = place.partition(":")
        result = getattr(import_module(f"deepseek.train.jobs.{module}"), function)(
            **values, **extra_values
        )
        if not getattr(job_arguments, "dry_run", False):
            echo(result)

    kind = Parameter.KEYWORD_ONLY
    annotations = {}
    for name, argument in arguments.items():
        annotations[name] = annotation(argument, declaration, name == positional)
    if positional:
        annotations[BY_OPTION] = Annotated[
            str | None, typer.Option(option_names[positional], help=f"The same as {METAVAR}.")
        ]
    annotations |= extra_options or {}
    parameters = [
        Parameter(name, kind, default=None, annotation=parameter_annotation)
        for name, parameter_annotation in annotations.items()
    ]
    command.__doc__ = summary
    command.__annotations__ = {**annotations, "return": None}
    command.__signature__ = Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    return command


def option_name(name: str) -> str:
    """Return the option of an argument."""
    return f"--{name.replace('_', '-')}"


def annotation(argument: Argument, declaration: type[Declaration], positional: bool) -> Any:
    """Return Typer's annotation of an argument: its type on the command line and its help text.

    Args:
        argument: the declared argument.
        declaration: the job's arguments; inherited ones get a help panel of their own.
        positional: whether the argument is given by position.
    """
    if positional:
        return Annotated[str | None, typer.Argument(metavar=METAVAR, help=argument.about)]
    option = option_name(argument.name)
    panel = None if argument.owner is declaration else argument.owner.__doc__
    about: dict[str, Any] = {"help": argument.about, "rich_help_panel": panel}
    if get_origin(argument.kind) is dict:
        return Annotated[Any, typer.Option(option, parser=read_mapping, metavar="YAML", **about)]
    return Annotated[_option_type(argument.kind) | None, typer.Option(option, **about)]


def _option_type(kind: Any) -> Any:
    """Return the type of an option: a list for several values, `Path` for what can be a file."""
    if get_origin(kind) is tuple:
        return list[_option_type(get_args(kind)[0])]  # type: ignore[misc]
    return kind if kind in (int, float, bool, str) or get_origin(kind) is Literal else Path
