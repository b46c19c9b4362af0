"""`docs/claims.md` is what `benchmarks/claims_page.py` generates from claims and result files."""

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from deepseek.claims.evaluation import MeasuredFigure, claim_table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "claims.md"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        for name in ("report", "claims_page"):
            sys.modules.pop(name, None)
        return import_module("claims_page")


def test_the_page_is_up_to_date_but_for_staleness(maker: ModuleType) -> None:
    written = maker.without_staleness(PAGE.read_text())
    made = maker.without_staleness(maker.page(claim_table(ROOT)))
    assert written == made, "run python benchmarks/claims_page.py"


def test_only_staleness_is_left_out_of_the_comparison(maker: ModuleType) -> None:
    text = "| dpe | partly, stale | x, stale bread |\n\n## Older than the code\n\nz\n"
    assert maker.without_staleness(text) == "| dpe | partly | x bread |\n\n"


def test_every_claim_has_its_part_of_the_page() -> None:
    headings = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
    assert headings[:-2] == [row.name for row in claim_table(ROOT).claims]


def test_commands_name_no_folder_of_a_machine() -> None:
    commands = re.findall(r"\| `(python .*?)` \|", PAGE.read_text())
    assert commands
    assert [command for command in commands if re.search(r"(?<![\w.~])/", command)] == []


@pytest.mark.parametrize(
    ("goal", "value", "interval", "attained"),
    [
        (">= 2.0x", 3.0, [2.0, 4.0], [1.5, 1.0, 2.0]),
        ("<= 2.0x", 4.0, None, [0.5]),
        ("<= 2.0x", -1.0, None, [20.0]),
        (">= 2.0x", 0.6, [None, 1.0], [0.3, 0.1, 0.5]),
        ("= 2.0x", 2.0, None, []),
    ],
)
def test_the_picture_shows_how_far_a_figure_reaches(
    goal: str,
    value: float,
    interval: list[float | None] | None,
    attained: list[float],
    maker: ModuleType,
) -> None:
    figure = MeasuredFigure(
        what="x", text="x", goal=goal, bound=2.0, value=value, interval=interval
    )
    assert maker.attained(figure) == pytest.approx(attained)
