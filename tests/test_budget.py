"""Sizes that keep the house readable: file, function and package budgets, printed with every run."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "deepseek"

FILE_LINES = 400
FUNCTION_LINES = 60
PACKAGE_LINES = 12_000

FORBIDDEN_NAMES = {"utils", "common", "helpers", "manager", "misc"}


def line_counts() -> dict[str, int]:
    files = PACKAGE.rglob("*.py")
    return {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in files}


def function_lines() -> dict[str, int]:
    """Return the length of every function, from its `def` to its last line, docstring included."""
    lengths = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"
                lengths[name] = (node.end_lineno or node.lineno) - node.lineno + 1
    return lengths


def above(sizes: dict[str, int], limit: int) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size > limit}


def test_files_functions_and_package_stay_within_their_budgets() -> None:
    assert above(line_counts(), FILE_LINES) == {}
    assert above(function_lines(), FUNCTION_LINES) == {}
    assert sum(line_counts().values()) < PACKAGE_LINES


def test_file_names_say_what_is_inside() -> None:
    assert not {path.stem for path in PACKAGE.rglob("*")} & FORBIDDEN_NAMES


def size_report() -> str:
    """Return one line on the package's sizes; `conftest.py` puts it under every test run."""
    files, functions = line_counts(), sorted(function_lines().values())
    largest = max(files, key=files.__getitem__)
    return (
        f"{sum(files.values())} of {PACKAGE_LINES} lines in {len(files)} files, largest {largest} ({files[largest]}); "
        f"{len(functions)} functions, median {functions[len(functions) // 2]} lines, longest {functions[-1]}"
    )
