"""Write `docs/benchmarks.md` from `benchmarks/results/*.json`: one row per figure, one column per
processor.

    python benchmarks/report.py    # --check: fail if the page is out of date; write nothing

`benchmarks/report.yaml` lists the rows; its first lines say how to add one.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = ROOT / "benchmarks" / "report.yaml"
PAGE = ROOT / "docs" / "benchmarks.md"

PROCESSORS = {
    "AMD EPYC, 2 cores, AVX512": "EPYC, AVX-512",
    "AMD EPYC, 2 cores, AVX2": "EPYC, AVX2",
    "Intel(R) Xeon(R) Processor, 2 cores, AVX512": "Xeon, AVX-512",
}
"""Short names of machines in result files, in the order of the columns; other machines are shown
with their full names.
"""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        what: what was measured.
        result: result files without ".json", at most one for each processor.
        path: keys that lead to the figure, joined by "/".
        form: format string of the figure, with its unit.
        page: page under `docs/` that explains it.
        over: path of the figure that it is divided by; None: not divided.
        take: "max" or "min", if the path leads to several figures by name.
        scale: factor before it is formatted; 1e3 turns seconds into milliseconds.
    """

    what: str
    result: str | list[str]
    path: str
    form: str
    page: str
    over: str | None = None
    take: str | None = None
    scale: float = 1.0

    @property
    def files(self) -> list[str]:
        return [self.result] if isinstance(self.result, str) else self.result


INTRODUCTION = """\
# Benchmarks

<!-- Written by `python benchmarks/report.py` from `benchmarks/results/*.json`. Do not edit. -->

Each figure comes from a file in `benchmarks/results/`, which a command of this repository wrote; the
[last table](#where-the-figures-come-from) gives command, processor, threads, commit and date. A column is one
processor: compare figures within a column only. The [log](log/index.md) records what was expected, tried and dropped.

To measure on your machine, run the command in a clone, or `deepseek bench NAME`.
"""

ANCHOR = "#where-the-figures-come-from"

PROVENANCE = """\
## Where the figures come from

`CORPORA` is the folder that `python benchmarks/corpora.py` fills, `FOLDER` a folder of your choice. `-dirty` behind a
commit means that the checkout had uncommitted changes.
"""


@cache
def result(name: str) -> dict[str, Any]:
    """Return a result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def lookup(name: str, path: str) -> Any:
    """Return the value at a path in a result file."""
    place: Any = result(name)
    for key in path.split("/"):
        place = place[key]
    return place


def figure(row: Row, name: str) -> str:
    """Return a row's formatted figure from one result file."""
    value = lookup(name, row.path)
    if row.take is not None:
        value = {"max": max, "min": min}[row.take](value.values())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if row.over is not None:
        value /= lookup(name, row.over)
    return row.form.format(value if row.scale == 1.0 else value * row.scale)


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(cells: list[str]) -> list[str]:
    return [line(cells), f"|{'---|' * len(cells)}"]


@cache
def sections() -> dict[str, list[Row]]:
    """Return the rows by the title of their section."""
    return {
        title: [Row(**row) for row in rows]
        for title, rows in yaml.safe_load(ROWS.read_text()).items()
    }


def used() -> list[str]:
    """Return the names of the result files that rows use, sorted."""
    return sorted({name for rows in sections().values() for row in rows for name in row.files})


def processors() -> list[str]:
    """Return the machines of these files, in the order of the columns."""
    present = {result(name)["machine"] for name in used()}
    return [one for one in PROCESSORS if one in present] + sorted(present - PROCESSORS.keys())


def table(rows: list[Row]) -> list[str]:
    """Return the lines of a section's table."""
    machines = processors()
    lines = head(["figure", *(PROCESSORS.get(one, one) for one in machines), "result", "page"])
    for row in rows:
        by_machine = {result(name)["machine"]: figure(row, name) for name in row.files}
        assert len(by_machine) == len(row.files), f"two results of one processor: {row.files}"
        sources = ", ".join(f"[{name}]({ANCHOR})" for name in row.files)
        page = f"[{Path(row.page).stem}]({row.page})"
        lines.append(
            line([row.what, *(by_machine.get(machine, "") for machine in machines), sources, page])
        )
    return lines


def portable(command: str) -> str:
    """Return a command as typed in any clone: without its output file and local folders."""
    command = re.sub(r" --json \S+", "", command)
    command = re.sub(r"^python (?!benchmarks/)", "python benchmarks/", command)
    command = command.replace("/tmp/corpora", "CORPORA")
    return re.sub(r"(?<![\w.~])/[\w./:-]+", "FOLDER", command)


def provenance(names: Iterable[str]) -> list[str]:
    """Return the table of result files with their commands and machines."""
    lines = head(["result", "command", "processor", "threads", "commit", "date"])
    for name in names:
        one = result(name)
        link = f"[{name}](../benchmarks/results/{name}.json)"
        machine = PROCESSORS.get(one["machine"], one["machine"])
        lines.append(
            line(
                [
                    link,
                    f"`{portable(one['command'])}`",
                    machine,
                    str(one["threads"]),
                    f"`{one['commit']}`",
                    one["date"],
                ]
            )
        )
    return lines


def page() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for title, rows in sections().items():
        parts.append("\n".join([f"## {title}\n", *table(rows), ""]))
    parts.append("\n".join([PROVENANCE, *provenance(used()), ""]))
    return "\n".join(parts)


def write_or_check() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="fail where the page is out of date; write nothing"
    )
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit("error: docs/benchmarks.md is out of date; run python benchmarks/report.py.")


if __name__ == "__main__":
    write_or_check()
