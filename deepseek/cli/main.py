"""Entry point of the command line: dispatches to commands, imported on demand, and reports errors.

`COMMANDS` names each command as `module:name` in this folder: a function, or a Typer application if
it has subcommands.

Exit codes: 0 success; 1 a question answered with no, packs that differ (`expert diff`), or a bug in
this package; 2 a user error (the message says what to do); 130 interrupted; 141 nobody reads the
output any more.
"""

import logging
import os
import shlex
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from deepseek import __version__
from deepseek.cli.interrupts import INTERRUPTS
from deepseek.cli.output import discard, echo, open_streams
from deepseek.errors import UserError

COMMANDS = {
    "run": ("run:run", "Serve a model and train an expert on a git history meanwhile."),
    "pull": ("pull:pull", "Fetch a base model."),
    "models": ("models:app", "List and remove the models in the library's home."),
    "chat": ("chat:chat", "Talk to a model in the terminal."),
    "generate": ("generate:generate", "Complete one prompt."),
    "pretrain": (
        "pretrain:pretrain",
        "Train a tokenizer and a model from scratch on a mix of texts.",
    ),
    "adapt": (
        "adapt:adapt",
        "Fine-tune a model: its last layers, LoRA adapters, all weights, or a module.",
    ),
    "align": ("align:align", "Align a model with preferences: RLPO, or DPO and RLOO by TRL."),
    "data": ("data:app", "Make training text: functions with tests, questions, checked problems."),
    "train": ("train:train", "Run a recipe of several training stages and write a model card."),
    "runs": ("runs:app", "List, show, compare and remove training runs."),
    "plan": ("plan:plan", "Estimate memory, traffic and time of training or inference."),
    "eval": ("eval:evaluate", "Compare held-out loss before and after plugging experts."),
    "distill-hash": ("distill_hash:distill_hash", "Fit the hashes of LSH attention to a model."),
    "inspect": ("inspect:app", "Draw how much attention LSH attention keeps."),
    "prefs": (
        "prefs:app",
        "The preference database: import, add, generate, search, stats, split, export.",
    ),
    "bench": ("bench:app", "Run a benchmark: speed, memory, accuracy, comparison with others."),
    "claims": ("claims:app", "The article's claims: what was measured, and what is reached."),
    "quantize": ("quantize:quantize", "Quantise a model's weights to 8 bits or fewer."),
    "export": (
        "export:export",
        "Export a model to GGUF, ONNX, OpenVINO, TensorRT or stock transformers.",
    ),
    "serve": ("serve:app", "Serve a model: OpenAI's API, hot-pluggable experts, a web page."),
    "watch": ("watch:watch", "Update an expert whenever its source changes, and plug it live."),
    "expert": ("expert:app", "Train, import, list, rename, remove and check expert packs."),
}

TRAINS = frozenset({"adapt", "align", "expert", "pretrain", "train", "watch"})
"""Commands whose OpenMP threads sleep at barriers. Their parallel regions are long, so spinning
would only burn cores that other processes need. The decoder has many short regions, for which
spinning (the default) is faster."""

QUIET_VARIABLES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Variables by which other libraries, and the processes that they start, say less."""

NOISY_LOGGER = "torch.onnx._internal.exporter._registration"
"""Logger that warns of operators of torchvision, which no export has."""

HELP = ("--help", "-h")
"""Options that show a help text, of `deepseek` and of every command."""

OPTIONS = (*HELP, "--version", "-V", "--debug")
"""Options without a command."""

INTERRUPTED = 130

BROKEN_PIPE = 141
"""Status of a process that SIGPIPE would have ended, as shells report it."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit the process with its status.

    Args:
        arguments: words of the command line; default: `sys.argv[1:]`.
    """
    open_streams()
    debug, arguments = _take_debug(sys.argv[1:] if arguments is None else arguments)
    if not debug:
        _hide_foreign_warnings()
    INTERRUPTS.watch()
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        status = _report(error, arguments, debug)
    finally:
        INTERRUPTS.unwatch()
    sys.exit(status)


def _report(error: BaseException, arguments: list[str], debug: bool) -> int:
    """Say why a command ended, and return the exit status.

    Args:
        error: what ended it.
        arguments: words of the command line.
        debug: show the traceback.
    """
    if isinstance(error, SystemExit):
        if not isinstance(error.__context__, BrokenPipeError):
            raise error
        error = error.__context__  # Rich ends the process with status 1 where nobody reads
    if isinstance(error, KeyboardInterrupt):  # a long job's message says what it has saved
        command = shlex.join(["deepseek", *arguments])
        return _say(f"{error}: {command}" if error.args else "interrupted", INTERRUPTED, debug)
    if isinstance(error, UserError):
        return _say(f"error: {error}", 2, debug)
    if isinstance(error, BrokenPipeError):  # the reader of the output is gone, such as `head`
        discard(sys.stdout)
        discard(sys.stderr)
        return BROKEN_PIPE
    if isinstance(error, OSError):
        discard(sys.stdout)  # what could not be written would fail again at the end
        return _say(f"error: {_os_cause(error)}", 2, debug)
    if INTERRUPTS.noted:  # an import that Ctrl-C has cut short fails with any error
        return _say("interrupted", INTERRUPTED, debug)
    hint = "" if debug else "; run it again with --debug for the traceback"
    return _say(f"error: unexpected {type(error).__name__} ({error}){hint}", 1, debug)


def _hide_foreign_warnings() -> None:
    """Keep notes of other libraries to their own users off the terminal; `--debug` shows them."""
    warnings.simplefilter("ignore")
    logging.getLogger(NOISY_LOGGER).setLevel(logging.ERROR)
    for name, value in QUIET_VARIABLES.items():
        os.environ.setdefault(name, value)


def _run(arguments: list[str]) -> int:
    """Dispatch to a command and return its exit status."""
    if arguments[:1] == ["help"] and arguments[1:]:
        arguments = [*arguments[1:], HELP[0]]
    if not arguments or arguments[0] in (*HELP, "help"):
        echo(_help(), lines=True)
        return 0
    if arguments[0] in ("--version", "-V"):
        echo(f"deepseek {__version__}")
        return 0
    place, _ = _command(arguments[0])
    if arguments[0] in TRAINS:
        # PyTorch reads it when it is loaded, which happens later.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return _call(place, f"deepseek {arguments[0]}", arguments[1:])


def _command(name: str) -> tuple[str, str]:
    if name in COMMANDS:
        return COMMANDS[name]
    from deepseek.registry import nearest

    if name.startswith("-"):
        raise UserError(f"unknown option {name!r}; {nearest(name, OPTIONS)}.")
    raise UserError(f"unknown command {name!r}; {nearest(name, COMMANDS)}.")


def _call(place: str, program: str, arguments: list[str]) -> int:
    """Run the command at `place` and return its exit status; usage errors become `UserError`."""
    from typer.exceptions import Exit, TyperException
    from typer.main import get_command

    command = get_command(_application(place))
    command.context_settings.setdefault("help_option_names", [*HELP])  # subcommands inherit it
    try:
        # Not `command.main`, which would swallow KeyboardInterrupt and its message.
        with command.make_context(program, arguments) as context:
            command.invoke(context)
    except Exit as exit_request:
        return exit_request.exit_code
    except TyperException as error:
        from deepseek.cli.usage import usage_sentence

        raise UserError(usage_sentence(error, program)) from error
    return 0


def _application(place: str) -> Any:
    """Return the Typer application at `module:name`; a plain function is wrapped in one."""
    from typer import Typer

    module, _, name = place.partition(":")
    target = getattr(import_module(f"deepseek.cli.{module}"), name)
    if isinstance(target, Typer):
        return target
    application = Typer(add_completion=False)
    application.command()(target)
    return application


def _help() -> str:
    rows = "\n".join(f"  {name:14}{summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: deepseek COMMAND [OPTIONS]\n\n"
        "Expert modules for language models: trained separately, plugged into a live model.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n  --help      Show this text, or a command's: deepseek COMMAND --help\n"
        "  --version   Show the version.\n"
        "  --debug     With any command: show the traceback of an error."
    )


def _take_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Return whether `--debug` is given (before any `--`), and the arguments without it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    return len(options) < end, options + arguments[end:]


def _os_cause(error: OSError) -> str:
    """Return an `OSError` as one sentence; one about an unusable home names its variable."""
    from deepseek.checkpoint.files import writable_folder
    from deepseek.checkpoint.store import home

    path_prefix = f"{error.filename}: " if error.filename else ""
    if isinstance(error.filename, str):
        place, root = (Path(path).absolute() for path in (error.filename, home()))
        if place.is_relative_to(root) or root.is_relative_to(place):
            try:
                writable_folder(root / "models")
            except UserError as unusable:
                return f"DEEPSEEK_HOME: {unusable}"
    return f"{path_prefix}{error.strerror or error}."


def _say(message: str, status: int, debug: bool) -> int:
    """Print a message on standard error, after the traceback if `debug`, and return `status`."""
    with suppress(OSError):  # nobody may be reading
        if debug:
            import traceback

            echo(traceback.format_exc(), lines=True, error=True)
        echo(message, error=True)
    return status
