"""Measure results again with the commands declared in `benchmarks/claims.yaml`."""

import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from deepseek.checkpoint.store import home
from deepseek.claims.child import run_pythons
from deepseek.claims.declaration import DeclaredClaims
from deepseek.claims.evaluation import ClaimRow, results_folder
from deepseek.errors import ConfigError

LAST_LINES = 20
"""Number of last lines of a failed command's output to show."""

SEVERAL_CORPORA = "many"
"""Corpora that `benchmarks/corpora.py` writes into separate folders."""


@dataclass(frozen=True)
class Places:
    """Folders and files that commands name.

    Attributes:
        results: where result files are written.
        corpora: text that `benchmarks/corpora.py` fetches.
        work: partial results of interrupted runs, in a folder for each result and version of the
            measured code, so that nothing measured before a change is used after it.
    """

    results: Path
    corpora: Path
    work: Path

    @classmethod
    def of_user(cls, checkout: Path) -> "Places":
        """Return the results of the checkout, and folders in the library's home."""
        return cls(results_folder(checkout), home() / "corpora", home() / "bench")

    @classmethod
    def below(cls, folder: Path) -> "Places":
        """Return places in a temporary folder, which is the library's home too."""
        return cls(folder / "results", folder / "corpora", folder / "bench")

    def filled_in(self, command: str, result: str, version: str = "") -> list[str]:
        """Return the arguments of one result's command, without the interpreter.

        Args:
            command: the command as it is declared.
            result: name of the result.
            version: version of the code that it measures, and of the command (`History.version`).
        """
        values = {
            "RESULT": self.results / f"{result}.json",
            "PLOT": self.results / f"{result}.png",
            "CORPORA": self.corpora,
            "WORK": self.work / (f"{result}-{version}" if version else result),
        }
        words = []
        for word in shlex.split(command):
            name, slash, rest = word.partition("/")
            words.append(f"{values[name]}{slash}{rest}" if name in values else word)
        return words


def due_results(
    declaration: DeclaredClaims, rows: Iterable[ClaimRow], quick: bool, only_stale: bool
) -> list[str]:
    """Return the results of claims that have a command, each once.

    Args:
        declaration: the claims.
        rows: the claims to run, with their figures.
        quick: return those with a quick command instead.
        only_stale: leave out those that are there, whole and not stale.
    """
    selected_results = chain.from_iterable(
        _select_results(declaration, row, only_stale) for row in rows
    )
    return [
        result for result in dict.fromkeys(selected_results) if _command(declaration, result, quick)
    ]


def left_out(
    declaration: DeclaredClaims, rows: Iterable[ClaimRow], only_stale: bool
) -> dict[str, str]:
    """Return the results of claims that have no command of their own, with the one that made each.

    Such a result needs text or models that this module cannot fetch, or another machine.

    Args:
        declaration: the claims.
        rows: the claims, with their figures.
        only_stale: leave out those that are there, whole and not stale.
    """
    commands = {}
    for row in rows:
        commands_by_result = {
            figure.source.result: figure.source.command for figure in row.figures if figure.source
        }
        for result in _select_results(declaration, row, only_stale):
            if not _command(declaration, result, quick=False):
                commands[result] = commands_by_result.get(result, "")
    return commands


def _command(declaration: DeclaredClaims, result: str, quick: bool) -> str:
    measurement = declaration.results[result]
    return measurement.quick if quick else measurement.command


def _select_results(declaration: DeclaredClaims, row: ClaimRow, only_stale: bool) -> list[str]:
    """Return the results of a claim; with `only_stale` those that are stale, or lack figures."""
    results = used_results(declaration, row.name)
    if not only_stale:
        return results
    sources = [(figure.source, bool(figure.text)) for figure in row.figures if figure.source]
    incomplete = {source.result for source, is_measured in sources if not is_measured}
    current = {source.result for source, _ in sources if source.changed == []} - incomplete
    return [result for result in results if result not in current]


def used_results(declaration: DeclaredClaims, claim: str) -> list[str]:
    """Return the results that the figures of a claim come from, each once."""
    figures = declaration.claims[claim].figures
    return list(dict.fromkeys(chain.from_iterable(figure.results for figure in figures)))


def check_corpora(commands: Iterable[list[str]], corpora: Path) -> None:
    """Check that the text that the commands need is there.

    Raises:
        ConfigError: a folder below `corpora` that a command names is not there.
    """
    words = {word for word in chain.from_iterable(commands) if word.startswith(str(corpora))}
    missing_names = {Path(word).name for word in words if not Path(word).exists()}
    if missing_names:
        single_names = sorted(missing_names - {SEVERAL_CORPORA})
        selections = (
            [" ".join(single_names) if corpora.name not in single_names else "all"]
            if single_names
            else []
        )
        if SEVERAL_CORPORA in missing_names:
            selections.append(f"{SEVERAL_CORPORA} --megabytes 1")
        fetch_commands = " and ".join(
            f"`python benchmarks/corpora.py {names}`" for names in selections
        )
        raise ConfigError(
            f"text of the benchmarks is missing in {corpora}; fetch it with {fetch_commands}."
        )


def run_commands(
    commands: Mapping[str, Sequence[str]],
    checkout: Path,
    say: Callable[[str], None],
    at_once: int = 1,
    logs: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> list[str]:
    """Run commands in order and return the names of those that failed.

    Args:
        commands: arguments of Python by the name of the result.
        checkout: folder to run them in.
        say: called with a line before each command, and after one that failed.
        at_once: number that run side by side (default: 1).
        logs: folder for the commands' output; the end of a failed command's output is shown.
            Default: output is printed directly.
        variables: environment variables to add to those of this process; default: none.

    Raises:
        KeyboardInterrupt: interrupted; the message names the finished results.
    """
    failed_names: list[str] = []
    finished_names: list[str] = []
    running_names: list[str] = []
    output = {name: logs / f"{name}.log" for name in commands} if logs else None

    def on_start(name: str) -> None:
        running_names.append(name)
        number = len(running_names) + len(finished_names) + len(failed_names)
        say(f"[{number}/{len(commands)}] {name}: python {shlex.join(commands[name])}")

    def on_end(name: str, status: int) -> None:
        running_names.remove(name)
        if not status:
            finished_names.append(name)
            return
        failed_names.append(name)
        if output:
            for line in output[name].read_text(errors="replace").splitlines()[-LAST_LINES:]:
                say(line)
        say(f"{name} failed (exit code {status})")

    environment = os.environ | (variables or {})
    try:
        run_pythons(commands, checkout, environment, on_end, on_start, at_once, output)
    except KeyboardInterrupt:
        progress_note = (
            f"finished: {', '.join(finished_names)}" if finished_names else "nothing is finished"
        )
        during = ", ".join(running_names)
        raise KeyboardInterrupt(
            f"interrupted during {during}, {progress_note}; run it again"
        ) from None
    return failed_names


def run_quick_commands(
    commands: Mapping[str, Sequence[str]], checkout: Path, folder: Path, say: Callable[[str], None]
) -> list[str]:
    """Run quick commands, two side by side if there are two cores; no figure is kept.

    Args:
        commands: arguments of Python by the name of the result; the first prepares `folder` for the
            others.
        checkout: folder to run them in.
        folder: the library's home for them.
        say: as in `run_commands`.

    Returns:
        Names of those that failed.
    """
    cores = os.cpu_count() or 1
    at_once = min(2, cores)
    environment = {"DEEPSEEK_HOME": str(folder), "OMP_NUM_THREADS": str(cores // at_once)}
    (first_name, words), *other_commands = commands.items()
    failed_names = run_commands({first_name: words}, checkout, say, variables=environment)
    return failed_names or run_commands(
        dict(other_commands), checkout, say, at_once, folder, environment
    )


def quick_commands(
    declaration: DeclaredClaims, results: Iterable[str], places: Places
) -> Iterator[tuple[str, list[str]]]:
    """Yield the preparation of a quick run, and its commands."""
    yield "preparation", ["benchmarks/quick_home.py", str(places.corpora.parent)]
    for result in results:
        yield result, places.filled_in(declaration.results[result].quick, result)
