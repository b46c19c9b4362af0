"""Each documented promise of the server names an existing test."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "promises.md"
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text())


def functions(path: Path) -> set[str]:
    """Return the names of the functions in a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    promises = [row for row in rows if not re.match(r"\|(---|\s*what \|)", row)]
    assert len(promises) == len(NAMED) > 20
    assert [row for row in promises if "::" not in row] == []


def test_the_named_tests_are_there() -> None:
    assert [name for path, name in NAMED if name not in functions(ROOT / path)] == []
