"""Size limits that keep the code readable: caps on files and functions, and a ratchet; sizes are
printed with every run.
"""

import ast
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "deepseek"

FILE_LINES = 400
FUNCTION_LINES = 60
RATCHETS = {
    "fmt: skip": 0,
    "lines over 100 characters, in 1,000": 1.5,
    "parallel assignments, in 1,000 lines": 0.8,
}
"""Maximum of each in the package. They may be lowered, never raised."""

SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}

FORBIDDEN_NAMES = {"utils", "common", "helpers", "manager", "misc"}


def line_counts() -> dict[str, int]:
    files = PACKAGE.rglob("*.py")
    return {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in files}


def code_lines(path: Path) -> int:
    """Return the number of lines with code: not blank, comment or docstring."""
    with tokenize.open(path) as file:
        spoken = [
            token for token in tokenize.generate_tokens(file.readline) if token.type not in SILENT
        ]
    lines = {line for token in spoken for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def package_lines() -> int:
    return sum(code_lines(path) for path in PACKAGE.rglob("*.py"))


def function_lines() -> dict[str, int]:
    """Return the length of every function's body.

    Its signature, with one parameter per line, and its docstring, with one entry per parameter, do
    not count.
    """
    lengths = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"
                body = (
                    node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                )
                lengths[name] = (node.end_lineno or node.lineno) - body[0].lineno + 1
    return lengths


def above(sizes: dict[str, int], limit: int) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size > limit}


def test_files_and_functions_stay_within_their_caps() -> None:
    assert above(line_counts(), FILE_LINES) == {}
    assert above(function_lines(), FUNCTION_LINES) == {}


def dense_formatting() -> dict[str, float]:
    """Return how often dense formatting occurs, in the units of `RATCHETS`."""
    lines = skips = long = parallel = 0
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        lines += text.count("\n")
        skips += text.count("# fmt: skip")
        long += sum(len(line) > 100 for line in text.splitlines())
        parallel += sum(
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
            for node in ast.walk(ast.parse(text))
        )
    return dict(zip(RATCHETS, (skips, 1000 * long / lines, 1000 * parallel / lines), strict=True))


def test_dense_formatting_only_becomes_rarer() -> None:
    found = dense_formatting()
    assert {name: value for name, value in found.items() if value > RATCHETS[name]} == {}


def test_only_lines_with_code_on_them_count(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text(
        '"""Text\nof two lines."""\n\n# why\nx = """a\nb"""\n\n\ndef f():\n    "What."\n    return 1  # so\n'
    )
    assert code_lines(path) == 4


def test_file_names_say_what_is_inside() -> None:
    assert not {path.stem for path in PACKAGE.rglob("*")} & FORBIDDEN_NAMES


def test_no_class_name_stands_for_two_things() -> None:
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    names = Counter(
        node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1 and not name.startswith("_")] == []


def size_report() -> str:
    """Return one line on the package's sizes; `conftest.py` prints it after every test run."""
    files, functions = line_counts(), sorted(function_lines().values())
    largest = max(files, key=files.__getitem__)
    return (
        f"{package_lines()} lines of code, {sum(files.values())} lines in all {len(files)} files, "
        f"largest {largest} ({files[largest]}); "
        f"{len(functions)} functions, median {functions[len(functions) // 2]} lines, longest {functions[-1]}"
    )
