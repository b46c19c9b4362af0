"""Make results anew by the commands that `benchmarks/claims.yaml` declares."""

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
"""Of what a failed command printed, said again."""

MANY = "many"
"""Corpora that `benchmarks/corpora.py` puts into a folder of their own."""


@dataclass(frozen=True)
class Places:
    """Folders and files that commands name.

    Attributes:
        results: where result files are written.
        corpora: text that `benchmarks/corpora.py` fetches.
        work: what an interrupted run keeps; a folder for each result and version of the code that
            it measures, so that nothing measured before a change passes for measured after it.
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
        """Return places that end with a temporary folder, which is the library's home as well."""
        return cls(folder / "results", folder / "corpora", folder / "bench")

    def filled_in(self, command: str, result: str, version: str = "") -> list[str]:
        """Return the words of a command for one result, without the interpreter.

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
    declared: DeclaredClaims, rows: Iterable[ClaimRow], quick: bool, only_stale: bool
) -> list[str]:
    """Return the results of claims that have a command, each once.

    Args:
        declared: the claims.
        rows: the claims to run, with their figures.
        quick: those with a quick command instead.
        only_stale: leave out those that are there, whole and not stale.
    """
    wanted = chain.from_iterable(_wanted(declared, row, only_stale) for row in rows)
    return [result for result in dict.fromkeys(wanted) if _command(declared, result, quick)]


def left_out(
    declared: DeclaredClaims, rows: Iterable[ClaimRow], only_stale: bool
) -> dict[str, str]:
    """Return the results of claims that have no command of their own, with the one that made each.

    Such a result needs text or models that nothing here fetches, or another machine.

    Args:
        declared: the claims.
        rows: the claims, with their figures.
        only_stale: leave out those that are there, whole and not stale.
    """
    found = {}
    for row in rows:
        made = {
            figure.source.result: figure.source.command for figure in row.figures if figure.source
        }
        for result in _wanted(declared, row, only_stale):
            if not _command(declared, result, quick=False):
                found[result] = made.get(result, "")
    return found


def _command(declared: DeclaredClaims, result: str, quick: bool) -> str:
    measurement = declared.results[result]
    return measurement.quick if quick else measurement.command


def _wanted(declared: DeclaredClaims, row: ClaimRow, only_stale: bool) -> list[str]:
    """Return the results of a claim; with `only_stale` those that are stale, or lack figures."""
    used = used_results(declared, row.name)
    if not only_stale:
        return used
    sources = [(figure.source, bool(figure.text)) for figure in row.figures if figure.source]
    lacking = {source.result for source, is_measured in sources if not is_measured}
    fresh = {source.result for source, _ in sources if source.changed == []} - lacking
    return [result for result in used if result not in fresh]


def used_results(declared: DeclaredClaims, claim: str) -> list[str]:
    """Return the results that the figures of a claim come from, each once."""
    figures = declared.claims[claim].figures
    return list(dict.fromkeys(chain.from_iterable(figure.results for figure in figures)))


def check_corpora(commands: Iterable[list[str]], corpora: Path) -> None:
    """Refuse to start while text is missing that a command needs.

    Raises:
        ConfigError: a folder below `corpora` that a command names is not there.
    """
    words = {word for word in chain.from_iterable(commands) if word.startswith(str(corpora))}
    missing = {Path(word).name for word in words if not Path(word).exists()}
    if missing:
        few = sorted(missing - {MANY})
        wanted = [" ".join(few) if corpora.name not in few else "all"] if few else []
        if MANY in missing:
            wanted.append(f"{MANY} --megabytes 1")
        fetching = " and ".join(f"`python benchmarks/corpora.py {names}`" for names in wanted)
        raise ConfigError(
            f"text of the benchmarks is missing in {corpora}; fetch it with {fetching}."
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
        logs: folder for what each prints, of which the end is said if it fails; default: all is
            printed as it comes.
        variables: environment variables beside those of this process; default: none.

    Raises:
        KeyboardInterrupt: interrupted; says which are finished.
    """
    failed: list[str] = []
    finished: list[str] = []
    running: list[str] = []
    output = {name: logs / f"{name}.log" for name in commands} if logs else None

    def started(name: str) -> None:
        running.append(name)
        number = len(running) + len(finished) + len(failed)
        say(f"[{number}/{len(commands)}] {name}: python {shlex.join(commands[name])}")

    def ended(name: str, status: int) -> None:
        running.remove(name)
        if not status:
            finished.append(name)
            return
        failed.append(name)
        if output:
            for line in output[name].read_text(errors="replace").splitlines()[-LAST_LINES:]:
                say(line)
        say(f"{name} failed (exit code {status})")

    environment = os.environ | (variables or {})
    try:
        run_pythons(commands, checkout, environment, ended, started, at_once, output)
    except KeyboardInterrupt:
        done = f"finished: {', '.join(finished)}" if finished else "nothing is finished"
        during = ", ".join(running)
        raise KeyboardInterrupt(f"interrupted during {during}, {done}; run it again") from None
    return failed


def run_quick_commands(
    commands: Mapping[str, Sequence[str]], checkout: Path, folder: Path, say: Callable[[str], None]
) -> list[str]:
    """Run quick commands, two side by side where there are two cores, as no figure is kept.

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
    (first, words), *others = commands.items()
    failed = run_commands({first: words}, checkout, say, variables=environment)
    return failed or run_commands(dict(others), checkout, say, at_once, folder, environment)


def quick_commands(
    declared: DeclaredClaims, results: Iterable[str], places: Places
) -> Iterator[tuple[str, list[str]]]:
    """Give the preparation of a quick run, and its commands."""
    yield "preparation", ["benchmarks/quick_home.py", str(places.corpora.parent)]
    for result in results:
        yield result, places.filled_in(declared.results[result].quick, result)
