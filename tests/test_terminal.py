"""Untrusted text reaches a terminal only through one function, and without control characters."""

import ast
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.terminal import visible

PACKAGE = Path(__file__).parent.parent / "deepseek"

ANY = st.text(st.characters(exclude_categories=()), max_size=40)
"""Text with surrogates and control characters."""

DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@settings(max_examples=400, deadline=None)
@given(text=ANY)
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    for lines in (False, True):
        shown = visible(text, lines)
        shown.encode()
        kept = "\n\t" if lines else ""
        controls = {"Cc", "Cs", "Zl", "Zp"}
        assert not [c for c in shown if unicodedata.category(c) in controls and c not in kept]
        assert not [c for c in shown if unicodedata.bidirectional(c) in DIRECTIONS]
        assert visible(shown, lines) == shown


def test_ordinary_text_of_all_scripts_is_left_alone() -> None:
    text = "naïve Größe 漢字 العربية हिन्दी 👩‍👩‍👧 \\x1b [red]"
    assert visible(text) == visible(text, lines=True) == text
    assert visible("a\nb\tc\x1b[2J\x9b1m\u202e", lines=True) == "a\nb\tc\\x1b[2J\\x9b1m\\u202e"
    assert visible("a\nb") == "a\\nb"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("cli/*.py")), ids=lambda path: path.name)
def test_commands_print_through_one_function(path: Path) -> None:
    """Only `output.py` calls `print`, and Rich gets only `plain` text or constants."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        where = f"{path.name}:{node.lineno}"
        if ast.unparse(node.func) == "print":
            assert path.name == "output.py", where
        if name in ("print", "rule", "status") and path.name != "output.py":
            assert not any(isinstance(part, ast.JoinedStr) for part in node.args), where
