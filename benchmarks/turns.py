"""Run the sides of a comparison in turn, so that all run under the same conditions; options for
rivals.
"""

import argparse
import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from statistics import median
from typing import TypeVar

from bars import installed
from results import FOLDER

Figures = dict[str, float]
Turn = Callable[[], Figures]
Result = TypeVar("Result")
Side = TypeVar("Side", bound=Hashable)


def usual_waiting() -> dict[str, str]:
    """Return this process's environment without a policy for threads that wait. Sleeping between
    two products costs llama.cpp two thirds of its speed (docs/log/engine.md), so rivals and what
    they are compared with start with the default.
    """
    return {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}


def in_turn(turns: Mapping[Side, Callable[[], Result]], rounds: int) -> dict[Side, list[Result]]:
    """Return the results of each side by round, after a warm-up round."""
    found: dict[Side, list[Result]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            result = turn()
            if number:
                found[name].append(result)
                print(number, name, result, flush=True)
    return found


def medians(found: Mapping[str, list[Figures]]) -> dict[str, Figures]:
    """Return the median of each figure of each side over the rounds."""
    return {
        name: {key: median(one[key] for one in results) for key in results[0]}
        for name, results in found.items()
    }


def check_rivals(
    parser: argparse.ArgumentParser, result: Path | None, **rivals: Path | None
) -> None:
    """Refuse to overwrite a result in the repository without the figures of its rivals.

    Args:
        parser: parser of the arguments; its error ends the program.
        result: file to write; None: none.
        rivals: option name -> the Python that has the rival; None: there is none.
    """
    if result is None or result.resolve().parent != FOLDER:
        return
    for option, python in rivals.items():
        if python is None:
            parser.error(
                f"{result.name} is kept with its rivals; name a Python that has this one with "
                f"--{option}, or another file."
            )


def add_llama(parser: argparse.ArgumentParser) -> None:
    """Add the option for the Python that has llama.cpp."""
    parser.add_argument(
        "--llama",
        type=Path,
        default=installed("llama_cpp"),
        help="Python that has llama-cpp-python; default: this one",
    )
