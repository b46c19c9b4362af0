"""The command line: one table of commands, each imported only when it is called, and one place that
ends in errors.

A command is at `module:name` in this folder: a function, or a Typer application where it has
commands of its own.

Exit codes: 0 done, 1 a defect of ours, 2 a mistake that the message says how to mend, 130
interrupted.
"""

import os
import shlex
import sys
from importlib import import_module
from typing import Any

from deepseek import __version__
from deepseek.errors import UserError

COMMANDS = {
    "run": ("run:run", "From nothing to a chat with an expert trained on a git history."),
    "pull": ("pull:pull", "Fetch a base model."),
    "chat": ("chat:chat", "Talk to a model in the terminal."),
    "generate": ("generate:generate", "Complete one prompt."),
    "pretrain": (
        "pretrain:pretrain",
        "Train a tokenizer and a model from scratch on several kinds of text.",
    ),
    "adapt": (
        "adapt:adapt",
        "Fine-tune a model: its last layers, adapters, everything, or a module.",
    ),
    "align": ("align:align", "Make a model answer as preferred: RLPO, or DPO and RLOO by TRL."),
    "data": ("data:app", "Make training text: functions with their tests, checked problems."),
    "train": (
        "train:train",
        "Run a recipe: several stages, one after the other, with a model card.",
    ),
    "runs": ("runs:app", "List, show and compare training runs."),
    "plan": ("plan:plan", "What a training run would need on so many devices."),
    "eval": ("eval:evaluate", "Compare held-out loss before and after plugging experts."),
    "distill-hash": ("distill_hash:distill_hash", "Fit the hashes of LSH attention to a model."),
    "inspect": ("inspect:app", "Draw what the attention heads look at."),
    "prefs": (
        "prefs:app",
        "The preference database: import, add, generate, search, stats, split, export.",
    ),
    "bench": ("bench:app", "Run a measurement: speed, memory, accuracy, rivals beside it."),
    "quantize": ("quantize:quantize", "Round a model's weights to 8 bits."),
    "export": (
        "export:export",
        "Write a model for ONNX, OpenVINO, TensorRT or stock transformers.",
    ),
    "serve": ("serve:app", "Serve a model: OpenAI's routes, live experts, a web page."),
    "expert": ("expert:app", "Train, list, inspect, verify and sign expert packs."),
}

TRAINS = frozenset({"adapt", "align", "expert", "pretrain", "train"})
"""Commands whose parallel parts are long: their threads sleep while they wait for one another.
Threads that spin, as is right for a decoder's many short parts, keep a core busy for nothing when
another process has taken theirs."""

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command that `arguments` (default: those of the process) name, and exit."""
    debug, arguments = _take_debug(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:  # a long job says what it has kept
        stopped = f"{stop}: {shlex.join(['deepseek', *arguments])}" if stop.args else "interrupted"
        status = _say(stopped, INTERRUPTED, debug)
    except UserError as error:
        status = _say(f"error: {error}", 2, debug)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        status = _say(f"error: {_os_cause(error)}", 2, debug)
    except Exception as error:
        hint = "" if debug else "; run it again with --debug for the traceback"
        status = _say(f"error: unexpected {type(error).__name__} ({error}){hint}", 1, debug)
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    """Dispatch to a command and return its exit status."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_help())
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"deepseek {__version__}")
        return 0
    place, _ = _command(arguments[0])
    if arguments[0] in TRAINS:
        os.environ.setdefault(
            "OMP_WAIT_POLICY", "PASSIVE"
        )  # read when PyTorch is loaded, which is later
    return _call(place, f"deepseek {arguments[0]}", arguments[1:])


def _command(name: str) -> tuple[str, str]:
    if name in COMMANDS:
        return COMMANDS[name]
    from deepseek.registry import nearest

    what = "option" if name.startswith("-") else "command"
    raise UserError(f"unknown {what} {name!r}; {nearest(name, COMMANDS)}.")


def _call(place: str, program: str, arguments: list[str]) -> int:
    """Run the command at `place`; usage mistakes become `UserError`."""
    from typer.exceptions import Exit, TyperException
    from typer.main import get_command

    command = get_command(_application(place))
    try:
        # Not `command.main`, which would keep Ctrl-C and what it has to say from us.
        with command.make_context(program, arguments) as context:
            command.invoke(context)
    except Exit as done:
        return done.exit_code
    except TyperException as error:
        where = getattr(error, "ctx", None)
        page = where.command_path if where else program
        raise UserError(f"{_sentence(error.format_message())}; see `{page} --help`.") from error
    return 0


def _application(place: str) -> Any:
    """Return the Typer application at `module:name`; a function that stands there is its only
    command.
    """
    from typer import Typer

    module, _, name = place.partition(":")
    found = getattr(import_module(f"deepseek.cli.{module}"), name)
    if isinstance(found, Typer):
        return found
    application = Typer(add_completion=False)
    application.command()(found)
    return application


def _help() -> str:
    rows = "\n".join(f"  {name:14}{summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: deepseek COMMAND [OPTIONS]\n\n"
        f"Expert modules for language models: trained alone, plugged into a live model.\n\ncommands:\n{rows}\n\n"
        "options:\n  --help      This text, or that of a command: deepseek COMMAND --help\n"
        "  --version   The version.\n  --debug     With any command: show the traceback of an error."
    )


def _sentence(message: str) -> str:
    """Return Typer's message in one line without its full stop."""
    return " ".join(message.split()).rstrip(".?")


def _take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Return whether `--debug` is among the options (before any `--`), and the arguments without
    it.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    return len(options) < end, options + arguments[end:]


def _os_cause(error: OSError) -> str:
    """Return an operating system's error as one sentence."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}."


def _say(message: str, status: int, debug: bool) -> int:
    """Print a message (with the traceback that led to it if `debug`) on standard error and return
    `status`.
    """
    if debug:
        import traceback

        traceback.print_exc()
    print(message, file=sys.stderr)
    return status
