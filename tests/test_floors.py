"""Imports go one way: a package ("room") imports only lower floors, or itself, and no files import
in a circle.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deepseek"

FLOORS = {
    "errors": 0,
    "checks": 0,
    "registry": 0,
    "terminal": 0,
    "device": 0,
    "kernels": 0,
    "checkpoint": 1,
    "packs": 1,
    "text": 1,
    "model": 2,
    "claims": 3,
    "data": 3,
    "planning": 3,
    "runner": 3,
    "compiled": 4,
    "retrieval": 4,
    "engine": 5,
    "export": 6,
    "train": 6,
    "evaluate": 7,
    "server": 7,
    "cli": 8,
}

NEIGHBOURS = {
    ("checks", "errors"),
    ("checks", "registry"),
    ("device", "errors"),
    ("device", "registry"),
    ("kernels", "device"),
    ("errors", "terminal"),
    ("kernels", "errors"),
    ("packs", "checkpoint"),
    ("registry", "errors"),
    ("server", "evaluate"),
}
"""Imports that are allowed within a floor."""

TYPE_ONLY_CYCLES = {
    ("model.experts.relevance", "model.experts.module"),
    ("model.positions.alibi", "model.context"),
    ("model.positions.dynamic", "model.context"),
    ("model.positions.protocol", "model.context"),
    ("model.pretrained", "model.transformer"),
}
"""Imports only for the type checker that close a circle. The list may only become shorter."""


def imports(source: str) -> Iterator[str]:
    """Yield the full name of every module or name that `source` imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                "imports name the whole path, so that they can be read out of context"
            )
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(source: str) -> set[str]:
    """Return the rooms that `source` imports; "" for the package's own facade."""
    parts = [name.split(".") for name in imports(source)]
    return {
        part[1] if len(part) > 1 and part[1] in FLOORS else ""
        for part in parts
        if part[0] == "deepseek"
    }


def violations(room: str, source: str) -> list[str]:
    """Return the imports of `source`, a file of `room`, that break the rules."""
    below = {other for other, floor in FLOORS.items() if floor < FLOORS[room]}
    allowed = below | {room} | {other for own, other in NEIGHBOURS if own == room}
    # The facade imports rooms on every floor; only the command line, above them all, may import it,
    # for the version.
    return sorted(rooms_imported(source) - allowed - ({""} if room == "cli" else set()))


def room_files() -> list[tuple[str, Path]]:
    files = sorted(PACKAGE.rglob("*.py"))
    rooms = [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in files]
    return [(room, path) for room, path in rooms if not room.startswith("__")]


@pytest.mark.parametrize(
    ("room", "path"), [pytest.param(*item, id=str(item[1].name)) for item in room_files()]
)
def test_a_file_imports_only_lower_floors(room: str, path: Path) -> None:
    assert room in FLOORS, f"the new room {room} needs a floor in this table"
    assert violations(room, path.read_text()) == [], (
        f"{path.relative_to(PACKAGE.parent)} imports upwards"
    )


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("model", "def f():\n    from deepseek.train.loop.loop import fit", ["train"]),
        ("text", "from deepseek.checkpoint import hub", ["checkpoint"]),
        ("train", "import deepseek.evaluate.quality as q", ["evaluate"]),
        ("model", "from deepseek import load", [""]),
        ("packs", "from deepseek.checkpoint.store import home\nimport torch", []),
    ],
)
def test_the_rule_sees(room: str, source: str, wrong: list[str]) -> None:
    assert violations(room, source) == wrong


def modules() -> dict[str, Path]:
    """Return the package's files by module name, without the facade, which imports from every
    floor.
    """
    paths = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    names = {
        ".".join(relative.parts).removesuffix(".__init__"): path for relative, path in paths.items()
    }
    return {name: path for name, path in names.items() if not name.startswith("__")}


def statements_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run when a module is imported, including those for the type
    checker.
    """
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from statements_at_import(getattr(statement, part, []))
        for handler in getattr(statement, "handlers", []):
            yield from statements_at_import(handler.body)


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return for each module the package's modules that it imports at import time."""
    graph = {}
    for module, source in sources.items():
        statements = statements_at_import(ast.parse(source).body)
        lines = [
            ast.unparse(node)
            for node in statements
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = [
            name.removeprefix("deepseek.")
            for name in imports("\n".join(lines))
            if name.startswith("deepseek.")
        ]
        # In `from a.b import c`, c is a file or a name in the file a.b.
        files = {name if name in sources else name.rpartition(".")[0] for name in names}
        graph[module] = files & sources.keys() - {module}
    return graph


def first_cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_in_a_circle() -> None:
    graph = import_graph({module: path.read_text() for module, path in modules().items()})
    for module, imported in TYPE_ONLY_CYCLES:
        assert imported in graph[module], (
            f"{module} does not import {imported} any more: take the pair off the list"
        )
        graph[module].remove(imported)
    assert first_cycle(graph) == []


def test_every_exception_closes_a_circle() -> None:
    graph = import_graph({module: path.read_text() for module, path in modules().items()})
    for module, imported in TYPE_ONLY_CYCLES:
        others = {pair for pair in TYPE_ONLY_CYCLES if pair != (module, imported)}
        kept = {
            name: {file for file in files if (name, file) not in others}
            for name, files in graph.items()
        }
        assert first_cycle(kept) != [], (
            f"{module} may import {imported}: take the pair off the list"
        )


@pytest.mark.parametrize(
    ("sources", "circular"),
    [
        (
            {"a.b": "from deepseek.a import c", "a.c": "if x:\n    from deepseek.a.b import name"},
            True,
        ),
        (
            {
                "a.b": "import deepseek.a.c",
                "a.c": "try:\n    import deepseek.a.b\nexcept E:\n    pass",
            },
            True,
        ),
        (
            {
                "a.b": "from deepseek.a.c import name",
                "a.c": "def f():\n    from deepseek.a.b import name",
            },
            False,
        ),
    ],
)
def test_a_circle_is_seen(sources: dict[str, str], circular: bool) -> None:
    assert bool(first_cycle(import_graph(sources))) == circular
