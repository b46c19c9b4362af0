"""What commands print. All of it passes `deepseek.terminal.visible`."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from deepseek.terminal import visible

if TYPE_CHECKING:
    from rich.text import Text


def echo(*parts: object, lines: bool = False, error: bool = False) -> None:
    """Print values on one line, separated by spaces.

    Args:
        parts: values, whose control characters are written out.
        lines: keep line breaks and tabs within them; default: one line.
        error: print on standard error; default: standard output.
    """
    text = " ".join(visible(part, lines) for part in parts)
    print(text, file=sys.stderr if error else sys.stdout, flush=error)


def plain(text: object, style: str = "") -> "Text":
    """Return text of others for Rich, which then reads no markup in it.

    Args:
        text: text, whose control characters are written out; line breaks and tabs stay.
        style: Rich style; default: none.
    """
    from rich.text import Text

    return Text(visible(text, lines=True), style=style)


def open_streams() -> None:
    """Give the process all three standard streams, and let none of them fail at a character.

    A closed descriptor would be taken by the next file that is opened, and then be printed to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            nowhere = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - stays open
            setattr(sys, name, nowhere)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def discard(stream: TextIO) -> None:
    """Send what is still buffered in a stream, and all that follows, to nowhere: nobody reads."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
