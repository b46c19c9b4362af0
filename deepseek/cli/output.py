"""What commands print. All of it passes `deepseek.terminal.visible`."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from deepseek.terminal import visible

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

UNLIMITED = 100_000
"""Width for Rich of what is no terminal."""


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


def figures_table(first: str, figures: Iterable[str], title: str | None = None) -> "Table":
    """Return a table for Rich: words in the first column, figures in the others.

    In a narrow terminal the widest column is broken first, its heading at spaces. A figure that
    does not fit is folded and loses no digits, which `no_wrap` would cut off.

    Args:
        first: heading of the first column.
        figures: headings of the others.
        title: title; None: none.
    """
    from rich.table import Table

    table = Table(title=plain(title) if title else None, title_justify="left")
    table.add_column(plain(first), overflow="fold")
    for heading in figures:
        table.add_column(plain(heading), justify="right", overflow="fold")
    return table


def print_table(table: "Table") -> None:
    """Print a table at the width of the terminal; in a file or a pipe, at its own.

    Args:
        table: a table for Rich.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=UNLIMITED)
    console.print(table)


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
            null_stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - stays open
            setattr(sys, name, null_stream)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def discard(stream: TextIO) -> None:
    """Send what is still buffered in a stream, and all that follows, to nowhere: nobody reads."""
    with suppress(OSError, ValueError):
        null_descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_descriptor, stream.fileno())
        os.close(null_descriptor)
