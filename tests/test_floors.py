"""Data flows one way: a room of the house imports only rooms on lower floors, or itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deepseek"

FLOORS = {
    "errors": 0,
    "registry": 0,
    "kernels": 0,
    "checkpoint": 1,
    "packs": 1,
    "text": 1,
    "model": 2,
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

NEIGHBOURS = {("registry", "errors"), ("kernels", "errors"), ("packs", "checkpoint")}
"""Imports that are allowed on one floor."""


def imports(source: str) -> Iterator[str]:
    """Give the full name of every module or name that `source` imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path, so that they can be read out of context"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(source: str) -> set[str]:
    """Return the rooms that `source` imports; "" for the package's own facade."""
    parts = [name.split(".") for name in imports(source)]
    return {part[1] if len(part) > 1 and part[1] in FLOORS else "" for part in parts if part[0] == "deepseek"}


def violations(room: str, source: str) -> list[str]:
    """Return what `source`, a file of `room`, imports against the rules."""
    below = {other for other, floor in FLOORS.items() if floor < FLOORS[room]}
    allowed = below | {room} | {other for own, other in NEIGHBOURS if own == room}
    # The facade names rooms on every floor; only the command line, above them all, may ask it for the version.
    return sorted(rooms_imported(source) - allowed - ({""} if room == "cli" else set()))


def room_files() -> list[tuple[str, Path]]:
    files = sorted(PACKAGE.rglob("*.py"))
    rooms = [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in files]
    return [(room, path) for room, path in rooms if not room.startswith("__")]


@pytest.mark.parametrize(("room", "path"), [pytest.param(*item, id=str(item[1].name)) for item in room_files()])
def test_a_file_imports_only_lower_floors(room: str, path: Path) -> None:
    assert room in FLOORS, f"the new room {room} needs a floor in this table"
    assert violations(room, path.read_text()) == [], f"{path.relative_to(PACKAGE.parent)} imports upwards"


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
