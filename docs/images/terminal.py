"""Draw a program's terminal output as a picture for the documentation.

    python docs/images/terminal.py PICTURE PROGRAM [ARGUMENT ...]

runs a program of this repository, as `python PROGRAM ARGUMENT ...` or, for `deepseek`, the command
line, and writes `PICTURE.svg` beside this file. Absolute paths among the arguments are shown by
their last part. The pictures of the tutorials are made by

    terminal-assistant  examples/applications/code_assistant.py CORPORA/final-litestar --cases 200
    terminal-papers     examples/applications/papers.py CORPORA/papers --minutes 10
    terminal-support    examples/applications/support.py german=CORPORA/german
                        spanish=CORPORA/spanish
    terminal-team       examples/applications/team_server.py NAME=FOLDER ... --tokens 16384

each with a separate home for runs and models, such as `DEEPSEEK_HOME=build/recording`.
"""

import argparse
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
FONT_FACE = re.compile(r"\s*@font-face \{[^}]*\}")
"""Rich's rules that load a font from another site; the reader's monospaced font does as well."""

REPLACED = re.compile(r"(?:\r|\x1b\[\d*[AK])+")
"""Control sequences that a progress bar writes before it redraws itself."""


def printed(command: list[str]) -> str:
    """Return what a command prints on standard output, connected to a terminal."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
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
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    text = b"".join(parts).decode()
    return "\n".join(REPLACED.split(line.rstrip("\r"))[-1] for line in text.split("\n"))


def shown(word: str) -> str:
    """Return an argument as the picture shows it."""
    before, equals, path = word.rpartition("=")
    return before + equals + (Path(path).name if Path(path).is_absolute() else path)


def main() -> None:
    """Run the program and write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", help="name of the picture, without .svg")
    parser.add_argument("program", help="a program of this repository, or `deepseek`")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    ours = options.program == "deepseek"
    program = ["-m", "deepseek"] if ours else [options.program]
    text = printed([sys.executable, *program, *options.arguments])
    typed = [options.program] if ours else ["python", options.program]
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text(f"$ {' '.join([*typed, *map(shown, options.arguments)])}", style="bold"))
    console.print(Text.from_ansi(text.strip()))
    picture = FONT_FACE.sub("", console.export_svg(title=""))
    (HERE / f"{options.picture}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
