"""Messages about a command line that Typer refuses: one sentence, with a hint where a habit from
another program is likely.
"""

import re
from typing import Any

from deepseek.registry import initials, nearest

MODEL_OPTIONS = ("--base", "--model", "-m")
"""How a model is named where it is not an argument, here and in other programs."""


def usage_sentence(error: Any, program: str) -> str:
    """Return the message for a refused command line.

    Args:
        error: the `TyperException`.
        program: the words of the command, if the exception does not know them.
    """
    context = getattr(error, "ctx", None)
    path = context.command_path if context else program
    hint = _hint(error, context) if context else ""
    # With a hint, Typer's own suggestion of options would only mislead.
    message = error.message if hint and hasattr(error, "possibilities") else error.format_message()
    return f"{_sentence(message)}{hint}; see `{path} --help`."


def _sentence(message: str) -> str:
    """Return Typer's message on one line, without its final punctuation and the name of an error's
    class that Pydantic puts before it.
    """
    message = re.sub(r"\. Did you mean (.*)\?", r"; perhaps \1 is meant", message)
    return " ".join(message.replace("Value error, ", "").split()).rstrip(".?")


def _hint(error: Any, context: Any) -> str:
    """Return what to add to the message, from a semicolon on; empty: nothing."""
    command = context.command
    options: list[str] = []
    for parameter in command.params:
        options += filter(lambda name: name.startswith("-"), parameter.opts)
    message = error.format_message()
    if hasattr(error, "possibilities"):
        return _option_hint(error, [*command.params], options)
    if message.startswith("Got unexpected extra argument"):
        flags = {"--base": "a model", "--from-folder": "a folder of text"}
        known = [f"{what} is named with {flag}" for flag, what in flags.items() if flag in options]
        return "".join(f"; {sentence}" for sentence in known)
    if message.startswith("Missing") and getattr(error, "param", None) is not None:
        return f": {error.param.help.rstrip('.')}" if error.param.help else ""
    if message.startswith("Missing command"):
        return f"; valid: {', '.join(command.list_commands(context))}"
    return ""


def _option_hint(error: Any, parameters: list[Any], options: list[str]) -> str:
    """Return the hint for an unknown option."""
    arguments = [parameter.name for parameter in parameters if parameter.opts[0][0] != "-"]
    if error.option_name in MODEL_OPTIONS and "model" in arguments:
        return "; the model is an argument, without an option"
    if error.option_name in MODEL_OPTIONS and "--base" in options:
        return "; a model is named with --base"
    name = error.option_name.lstrip("-")
    # `--lr` is short for `--learning-rate`.
    spelled = [option for option in options if initials(option) == name]
    if spelled:
        return f"; perhaps {spelled[0]} is meant"
    return "" if error.possibilities else f"; {nearest(error.option_name, options)}"
