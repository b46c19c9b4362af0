"""`docs/benchmarks.md` is what `benchmarks/report.py` generates from the result files."""

import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPORT = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
ROWS = [row for rows in REPORT["sections"]().values() for row in rows]


def test_the_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "benchmarks.md").read_text()
    assert written == REPORT["page"](), "run python benchmarks/report.py"


def test_rows_name_pages_that_are_there() -> None:
    assert [row.page for row in ROWS if not (ROOT / "docs" / row.page).is_file()] == []


def test_a_row_occurs_once() -> None:
    figures = Counter((row.path, row.take, *row.files) for row in ROWS)
    assert [figure for figure, count in figures.items() if count > 1] == []


def test_extremes_are_found_whoever_has_them() -> None:
    name = "base_and_gain_final"
    rows = {row.take: row for row in ROWS if row.take and row.files == [name]}
    kept = REPORT["lookup"](name, "summary/gain_kept_percent")
    assert REPORT["figure"](rows["max"], name) == f"{max(kept.values()):.1f} %"
    assert REPORT["figure"](rows["min"], name) == f"{min(kept.values()):.1f} %"


def test_the_table_of_clients_has_the_measured_counts() -> None:
    page = (ROOT / "docs" / "how-to" / "clients.md").read_text()
    told = Counter(re.findall(r"^\| .*? \| (\d+) \| (\d+) \| .*\|$", page, re.MULTILINE))
    suites = REPORT["result"]("clients")["suites"].values()
    assert told == Counter((str(suite["cases"]), str(suite["passed"])) for suite in suites)


def test_commands_name_no_folder_of_a_machine() -> None:
    commands = re.findall(r"\| `(python .*?)` \|", (ROOT / "docs" / "benchmarks.md").read_text())
    assert len(commands) == len(REPORT["used"]())
    assert [command for command in commands if re.search(r"(?<![\w.~])/", command)] == []


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (
            "python decode.py --rounds 5 --json /tmp/d.json",
            "python benchmarks/decode.py --rounds 5",
        ),
        (
            "python benchmarks/adapt.py /tmp/corpora/code-a /tmp/a",
            "python benchmarks/adapt.py CORPORA/code-a FOLDER",
        ),
        (
            "python benchmarks/against.py folder:~/src/click",
            "python benchmarks/against.py folder:~/src/click",
        ),
    ],
)
def test_a_command_is_shown_as_it_is_typed_in_any_clone(command: str, shown: str) -> None:
    assert REPORT["portable"](command) == shown
