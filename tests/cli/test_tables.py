"""Tables lose no figures: a narrow terminal folds them, a file gets whole lines."""

import pytest
from rich.console import Console

from deepseek.cli.output import figures_table, print_table
from deepseek.cli.table import comparison_table
from deepseek.evaluate.quality import Comparison

ROWS = [Comparison("repository", 8192, 7.7903, 6.1234, 5.9876)]
FIGURES = ("8,192", "7.7903", "6.1234", "-21.40%", "5.9876", "92.5%")


def rendered(width: int) -> str:
    """Return the table as a terminal of this width shows it."""
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(comparison_table(ROWS))
    return capture.get()


def test_figures_are_whole_where_they_fit() -> None:
    assert all(figure in rendered(80) for figure in FIGURES)


@pytest.mark.parametrize("width", [60, 40])
def test_figures_keep_their_digits_where_they_do_not_fit(width: int) -> None:
    lines = rendered(width).splitlines()
    assert max(map(len, lines)) <= width
    rows = [line.split("│")[1:-1] for line in lines if line.startswith("│")]
    columns = ["".join(cell.strip() for cell in column) for column in zip(*rows, strict=True)]
    assert tuple(columns) == ("repository", *FIGURES)


def test_a_file_has_whole_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    table = figures_table("text", ["loss in nats per token, of the base"])
    table.add_row("a name of more than thirty characters", "7.7903")
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "a name of more than thirty characters" in lines[3]
    assert max(map(len, lines)) < 90
