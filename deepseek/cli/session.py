"""The conversation behind `deepseek chat`."""

import contextlib
import sys
from collections.abc import Callable
from io import TextIOWrapper

from rich.console import Console

from deepseek.cli.interrupts import INTERRUPTS
from deepseek.cli.options import arming
from deepseek.cli.output import plain
from deepseek.cli.speak import Palette, legend, speak
from deepseek.engine.engine import Engine
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.errors import UserError
from deepseek.registry import nearest
from deepseek.terminal import is_unicode
from deepseek.text.chat_template import encode_prompt, user_ids
from deepseek.text.tokenizer import encode_document


class ChatSession:
    """Reads lines, answers them, and runs commands that begin with a slash.

    The engine's prefix cache holds the conversation so far, so that a turn costs only the prefill
    of its new tokens.

    Args:
        engine: a running engine.
        sampling: sampling parameters of all answers.
        console: where to print.
    """

    def __init__(self, engine: Engine, sampling: Sampling, console: Console) -> None:
        self.engine = engine
        self.sampling = sampling
        self.console = console
        self.palette = Palette(info.name for info in engine.experts())
        self.messages: list[dict[str, str]] = []
        self.open = True
        self.commands: dict[str, Callable[[str], None]] = {
            "/experts": self._list,
            "/plug": self._plug,
            "/unplug": self._unplug,
            "/arm": self._arm,
            "/raw": self._raw,
            "/reset": self._reset,
            "/quit": self._quit,
            "/help": self._help,
        }

    def run(self) -> None:
        """Answer lines until the input ends or `/quit`."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and line editing
        if isinstance(sys.stdin, TextIOWrapper):
            # An error of decoding would lose all lines that are read ahead.
            sys.stdin.reconfigure(errors="surrogateescape")
        self._list("")
        self.console.print("[dim]type a message, or /help[/]")
        while self.open:
            try:
                line = input("\n> " if self.console.is_terminal else "").strip()
            except EOFError:
                break
            if line:
                self._turn(line)

    def _turn(self, line: str) -> None:
        """Answer one line; report a user error in it and continue the conversation."""
        try:
            if not is_unicode(line):
                raise UserError("the line is not UTF-8; write it again.")
            if line.startswith("/"):
                self._command(line)
            else:
                self._answer(line)
        except UserError as error:
            self.console.print(plain(f"error: {error}", "red"))
        except KeyboardInterrupt:
            INTERRUPTS.answered()
            self.console.print("\n[dim]stopped[/]")

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name not in self.commands:
            raise UserError(f"{name} is not a command; {nearest(name, self.commands)}.")
        self.commands[name](argument.strip())

    def _answer(self, line: str) -> None:
        messages = [*self.messages, {"role": "user", "content": line}]
        tokenizer = self.engine.tokenizer
        text = self._speak(encode_prompt(tokenizer, messages), user_ids(tokenizer, messages))
        self.messages = [*messages, {"role": "assistant", "content": text}]

    def _raw(self, text: str) -> None:
        """Complete the text after the command instead of answering it."""
        text = _require(text, "/raw", "the text to complete")
        self._speak(encode_document(self.engine.tokenizer, text))

    def _speak(self, ids: list[int], user_ids: tuple[int, ...] | None = None) -> str:
        request = Request(tuple(ids), self.sampling, user_ids=user_ids)
        text, shares = speak(self.engine, request, self.console, self.palette)
        if self.engine.experts():
            self.console.print(legend(shares, self.palette))
        return text

    def _list(self, _: str) -> None:
        """List the plugged experts."""
        for info in self.engine.experts():
            state = f"{'armed' if info.armed else 'not armed'}, {info.verdict}"
            name = plain(info.name, self.palette.style(info.name))
            size = f"{info.num_bytes / 1e6:.0f} MB"
            self.console.print(name + plain(f"  {state}, {size}  {info.domain}"))
        if not self.engine.experts():
            self.console.print("[dim]no experts plugged; train one with `deepseek expert train`[/]")

    def _plug(self, argument: str) -> None:
        """Plug an expert: a pack file or the name of a trained one."""
        info = self.engine.plug(_require(argument, "/plug", "a pack file or an expert"))
        arming_note = "" if info.armed else "; not armed, `/arm` it by name to use it"
        name = plain(info.name, self.palette.style(info.name))
        self.console.print(plain("plugged ") + name + plain(f", {info.verdict}{arming_note}"))

    def _unplug(self, argument: str) -> None:
        """Unplug an expert by name; the model is then bit-identical to before."""
        self.engine.unplug(_require(argument, "/unplug", "a plugged expert"))
        self.console.print(plain(f"unplugged {argument}"))

    def _arm(self, argument: str) -> None:
        """Arm only these experts: comma-separated names, 'auto' or 'none'."""
        armed_names = self.engine.arm(arming(argument or "auto"))
        self.console.print(plain(f"armed: {', '.join(armed_names) or 'none'}"))

    def _reset(self, _: str) -> None:
        """Start a new conversation."""
        self.messages = []
        self.console.print("[dim]forgotten[/]")

    def _quit(self, _: str) -> None:
        """Leave; so does Ctrl-D."""
        self.open = False

    def _help(self, _: str) -> None:
        """Show this list."""
        for name, command in self.commands.items():
            self.console.print(plain(f"{name:10}{command.__doc__}"))


def _require(argument: str, command: str, description: str) -> str:
    """Return the argument of a command.

    Args:
        argument: what follows the command on its line.
        command: the command, such as `/plug`.
        description: what belongs there, for the message.

    Raises:
        UserError: nothing follows.
    """
    if not argument:
        raise UserError(f"{command} needs {description}; write it after the command.")
    return argument
