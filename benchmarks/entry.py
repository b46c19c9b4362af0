"""Command-line helpers of benchmarks: input paths are checked before hours of work, and an error
that the user can fix is reported in one sentence, with exit code 2.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deepseek.errors import DataError, UserError

KINDS = ("folder", "git", "jsonl", "parquet")
"""Kinds of text that an expert is trained on."""

WRONG_INPUT = 2
"""Exit code, as of `argparse`."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of `deepseek`."""


def existing_path(text: str) -> Path:
    """Return the path of a file or folder to read; for use as the `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: it does not exist.
    """
    path = Path(text).expanduser()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist; check the path.")
    return path


@dataclass(frozen=True)
class Source:
    """Text to train an expert on, named as `[NAME=]KIND:PATH`.

    Attributes:
        text: the whole argument.
        title: NAME; "" if there is none.
        kind: one of `KINDS`.
        place: PATH, absolute or relative to the root passed to `path`.
    """

    text: str
    title: str
    kind: str
    place: str

    @classmethod
    def of(cls, text: str) -> "Source":
        """Parse a command-line argument; for use as the `type` of an argument.

        Raises:
            argparse.ArgumentTypeError: it has no kind, or an unknown one.
        """
        title, _, named = text.rpartition("=")
        kind, colon, place = named.partition(":")
        if not colon or kind not in KINDS:
            raise argparse.ArgumentTypeError(
                f"{text} is no source; write KIND:PATH with one of {', '.join(KINDS)}"
            )
        return cls(text, title, kind, place)

    def path(self, root: Path) -> Path:
        """Return the absolute path.

        Raises:
            DataError: it does not exist.
        """
        path = (root / Path(self.place).expanduser()).resolve()
        if not path.exists():
            raise DataError(f"{path} does not exist; check the path.")
        return path


def run_main(main: Callable[[], None]) -> None:
    """Run a benchmark; on wrong input or Ctrl-C, end the process with one sentence and an exit
    code.
    """
    try:
        main()
    except KeyboardInterrupt as stop:  # a training's message says what it has saved
        print(stop if stop.args else "interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
    except subprocess.CalledProcessError as error:
        # The process has printed the reason, unless its output was captured.
        said = f": {error.stderr.strip()}" if error.stderr else "; see its messages above"
        program = Path(str(error.cmd[0])).name
        print(f"error: {program} ended with {error.returncode}{said}", file=sys.stderr)
        sys.exit(error.returncode if error.returncode > 0 else 1)
