"""Draw what a command prints in a terminal, as a picture for the pages.

Runs `deepseek run --no-serve` on this repository's history, and writes `terminal-repository.svg`. A
folder for its runs and models leaves those of the user alone:

DEEPSEEK_HOME=build/recording python docs/images/terminal.py
"""

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WIDTH = 100
PICTURES = {"terminal-repository.svg": ["run", "--no-serve", "--from-git", ".", "--minutes", "3"]}
"""Name of a picture, and the words behind `deepseek`."""

REPLACED = re.compile(r"(?:\r|\x1b\[\d*[AK])+")
"""What a progress bar writes before it draws itself again."""


def printed(words: list[str]) -> str:
    """Return what a command prints on its standard output, which is a terminal."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "deepseek", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=theirs, stdin=theirs)
    os.close(theirs)
    parts = []
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 1)[0]:
            try:
                parts.append(os.read(ours, 1 << 16))
            except OSError:  # the other end is closed
                break
    os.close(ours)
    if process.wait() != 0:
        raise SystemExit(f"deepseek {' '.join(words)} failed with {process.returncode}")
    text = b"".join(parts).decode()
    return "\n".join(REPLACED.split(line.rstrip("\r"))[-1] for line in text.split("\n"))


def draw(name: str, words: list[str]) -> None:
    """Write one picture."""
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text(f"$ deepseek {' '.join(words)}", style="bold"))
    text = printed(words).replace(str(ROOT), "~/deepseek")
    console.print(Text.from_ansi(text.strip()))
    console.save_svg(str(HERE / name), title="")


if __name__ == "__main__":
    for name, words in PICTURES.items():
        draw(name, words)
