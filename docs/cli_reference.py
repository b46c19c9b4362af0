"""The page of commands, from their declarations: what `deepseek COMMAND --help` shows, in one
place.
"""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from typer import Typer
from typer.main import get_command

from deepseek.cli.main import COMMANDS
from deepseek.cli.shapes import SHAPES

HEAD = """\
# Command line

Every command has `--help`, which shows the same. `--debug` goes with any command and prints the traceback of an error.
Exit codes: 0 success; 1 a bug in the library (`expert diff`: the packs differ; a confirmation prompt: answered no);
2 a user error; 130 interrupted; 141 the reader of the output closed it (`| head`).
"""

JSON = """\
## JSON output

Commands with `--json` print one object on standard output and nothing else there. Its
[JSON schema](https://json-schema.org) stands below. Fields may be added; none changes its meaning.
"""

NAMES = {str: "text", int: "number", float: "number", Path: "path"}


def application(place: str) -> Any:
    """Return the command that stands at `module:name` in `deepseek/cli`."""
    module, _, name = place.partition(":")
    found = getattr(import_module(f"deepseek.cli.{module}"), name)
    if not isinstance(found, Typer):
        single = Typer(add_completion=False)
        single.command()(found)
        found = single
    return get_command(found)


def commands() -> Iterator[tuple[str, Any]]:
    """Give all commands that can be typed, with what declares them: ("deepseek expert train",
    ...).
    """
    for name, (place, _) in COMMANDS.items():
        yield from walk(f"deepseek {name}", application(place))


def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child, below in getattr(command, "commands", {}).items():
        yield from walk(f"{name} {child}", below)


def options(command: Any) -> set[str]:
    """Return the options of a command as they are typed."""
    return {"--help", "--debug"}.union(*(one.opts + one.secondary_opts for one in command.params))


def default(parameter: Any) -> str:
    """Return a parameter's default; nothing where it has none, or one that says nothing."""
    value = parameter.default
    if value is None or callable(value) or value in ((), [], ""):
        return "required" if parameter.required else ""
    if parameter.secondary_opts:
        return f"`{parameter.opts[0] if value else parameter.secondary_opts[0]}`"
    return "" if value is False else f"`{value}`"


def names(parameter: Any) -> str:
    """Return how a parameter is typed, with its kind."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    spelled = ", ".join(f"`{one}`" for one in [*parameter.opts, *parameter.secondary_opts])
    if getattr(parameter, "is_flag", False):
        return spelled
    return f"{spelled} {parameter.metavar or kind(parameter.type_descriptor.annotation)}"


def kind(annotation: Any) -> str:
    """Return what an option takes: its choices, or the name of its type."""
    if get_origin(annotation) is Literal:
        return " / ".join(f"`{choice}`" for choice in get_args(annotation))
    inner = [one for one in get_args(annotation) if one is not type(None)]
    return kind(inner[0]) if inner else NAMES.get(annotation, annotation.__name__)


def section(name: str, command: Any) -> str:
    """Return a command's part of the page."""
    lines = [f"## {name}", "", " ".join((command.help or "").split()), ""]
    children = getattr(command, "commands", {})
    if children:
        lines += [f"Commands: {', '.join(f'`{child}`' for child in children)}.", ""]
    rows = [one for one in command.params if one.name != "help"]
    if rows:
        lines += ["| | default | |", "|---|---|---|"]
        lines += [
            f"| {names(one)} | {default(one)} | {(one.help or '').replace('|', '/')} |"
            for one in rows
        ]
        lines.append("")
    return "\n".join(lines)


def shapes() -> str:
    """Return the part about `--json`: the schema of each command's object."""
    parts = [JSON]
    for name, shape in SHAPES.items():
        schema = json.dumps(shape.model_json_schema(), indent=1)
        parts.append(f"### JSON of deepseek {name}\n\n```json\n{schema}\n```\n")
    return "\n".join(parts)


def page() -> str:
    """Return the page."""
    return "\n".join([HEAD, *(section(*item) for item in commands()), shapes()])


if __name__ == "__main__":
    print(page())
