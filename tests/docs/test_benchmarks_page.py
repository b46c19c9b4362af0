"""`docs/benchmarks.md` is what `benchmarks/report.py` makes of the result files."""

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
    figures = Counter((row.path, *row.files) for row in ROWS)
    assert [figure for figure, count in figures.items() if count > 1] == []


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
