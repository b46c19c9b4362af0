"""The package's top level: lazy names, a fast import, all dependencies declared."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions

import pytest
from test_floors import PACKAGE, imports

import deepseek

PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]


def normal(name: str) -> str:
    """Return the normalised name of a distribution (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", deepseek.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(deepseek, name) is not None
    assert name in dir(deepseek)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        deepseek.nonsense  # noqa: B018


def test_importing_the_package_loads_no_torch() -> None:
    program = "import sys, deepseek; print('torch' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert output == "False\n"


def test_the_version_is_the_project_s() -> None:
    assert deepseek.__version__ == PROJECT["version"]


def distributions_of(lines: list[str]) -> set[str]:
    return {normal(re.split(r"[<>=!~;\[ ]", line)[0]) for line in lines}


def missing(sources: Iterable[str], declared: set[str]) -> set[str]:
    """Return the modules that `sources` import and no declared distribution provides."""
    names = {name.split(".")[0] for source in sources for name in imports(source)}
    others = names - set(sys.stdlib_module_names) - {"deepseek"}
    known = packages_distributions()
    return {name for name in others if not {normal(d) for d in known.get(name, [name])} & declared}


def at_import(source: str) -> str:
    """Return the part of `source` that runs when the module is imported: no functions."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    return ast.unparse(tree)


def test_every_import_is_a_declared_dependency() -> None:
    sources = [path.read_text() for path in PACKAGE.rglob("*.py")]
    needed = distributions_of(PROJECT["dependencies"])
    extras = {
        name: distributions_of(lines)
        for name, lines in PROJECT["optional-dependencies"].items()
        if name != "dev"
    }
    assert missing(sources, needed.union(*extras.values())) == set()
    assert missing(map(at_import, sources), needed) == set(), (
        "what an extra brings is imported where it is used"
    )


def test_the_lock_pins_with_hashes_and_leaves_torch_to_the_machine() -> None:
    lock = (PACKAGE.parent / "requirements" / "dev.lock").read_text()
    pinned = dict(re.findall(r"^([a-z0-9_.-]+)==([^ ;]+)", lock, re.MULTILINE))
    assert "torch" not in pinned
    assert lock.count("--hash=sha256:") >= len(pinned)
    assert "://" not in lock
    declared = {normal(re.split(r"[<>=!~;\[ ]", line)[0]) for line in PROJECT["dependencies"]}
    assert declared - {"torch"} <= pinned.keys()


def test_no_pickle_and_no_code_from_data() -> None:
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    risky = re.compile(
        r"\bimport pickle\b|\btorch\.load\(|trust_remote_code=True|(?<![\w.])(?:eval|exec)\("
    )
    assert [path.name for path, source in sources.items() if risky.search(source)] == []
