"""Run a client's test cases and print the outcomes as a JSON object on standard output.

It runs in the client's own environment, so it uses only the standard library.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

Case = Callable[[], object]
"""Function that raises an exception if the case fails."""

LONGEST_REASON = 300


@dataclass(frozen=True)
class Target:
    """The server under test.

    Attributes:
        url: its address, without a trailing slash.
        model: name of the model.
        penalty: frequency penalty that cases with long answers send; 0: none.
    """

    url: str
    model: str
    penalty: float = 0.0


def run(cases: Callable[[Target], Iterable[tuple[str, Case]]], *packages: str) -> None:
    """Run a suite as a program and print which cases failed and why.

    Args:
        cases: returns pairs of name and case.
        packages: names of the packages whose versions are reported.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--penalty", type=float, default=0.0)
    parser.add_argument("--only", nargs="*", help="names of cases; default: all")
    options = parser.parse_args()
    target = Target(options.url, options.model, options.penalty)
    outcomes: dict[str, str | None] = {}
    for name, case in cases(target):
        if options.only is None or name in options.only:
            outcomes[name] = reason(case)
            print(f"{name}: {outcomes[name] or 'passed'}", file=sys.stderr, flush=True)
    report(outcomes, packages)


def report(outcomes: dict[str, str | None], packages: Iterable[str]) -> None:
    """Print the outcomes (None for a case that passed) with the versions of some packages."""
    versions = {package: version(package) for package in packages}
    print(json.dumps({"versions": versions, "outcomes": outcomes}))


def reason(case: Case) -> str | None:
    """Return why a case fails, in one line; None if it passes."""
    try:
        case()
    except Exception as error:  # every failure of a client is an outcome
        return one_line(f"{type(error).__name__}: {error}")
    return None


def one_line(text: str) -> str:
    """Return a text without line breaks, cut to `LONGEST_REASON` characters."""
    return " ".join(text.split())[:LONGEST_REASON]


def expect(condition: Any, what: str) -> None:
    """Raise an `AssertionError` with the message `what` unless the condition holds."""
    if not condition:
        raise AssertionError(what)


@contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[None]:
    """Expect the block to raise an exception whose message contains all of `words`."""
    try:
        yield
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        expect(not missing, f"the refusal does not name {missing}: {error}")
    else:
        raise AssertionError("it was not refused")
