"""Turn code into exercises: documented functions, with their bodies as answers and their tests."""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deepseek.data.text.document import Document


@dataclass(frozen=True)
class DocumentedFunction:
    """A documented Python function.

    Attributes:
        name: name of the function.
        header: source from decorators to the end of the docstring, the model's prompt.
        body: the lines after the header, the expected answer.
        tests: sources of the test functions that call it.
        where: name of its document.
    """

    name: str
    header: str
    body: str
    tests: tuple[str, ...]
    where: str

    @property
    def text(self) -> str:
        """The function and its tests as one source text."""
        return "\n\n\n".join([self.header + self.body, *self.tests]) + "\n"


def documented_functions(
    documents: Iterable[Document], shortest: int = 2
) -> list[DocumentedFunction]:
    """Return the documented functions in Python documents.

    A function's tests are the functions `test_...` anywhere in the documents that call it by name.
    Functions that share their name with others get no tests. Documents that do not parse are
    skipped.

    Args:
        documents: the documents; only Python code is read.
        shortest: minimum lines of a body; default: 2.
    """
    python = [
        document
        for document in documents
        if document.kind == "code" and document.name.endswith(".py")
    ]
    trees = [(document, tree) for document in python if (tree := parsed(document.text)) is not None]
    names = Counter(node.name for _, tree in trees for node in _functions(tree))
    tests = defaultdict(list)
    for document, tree in trees:
        for node in _functions(tree):
            if node.name.startswith("test"):
                for name in sorted(_called_names(node)):
                    if names[name] == 1:
                        tests[name].append(
                            _lines(document.text, _first_line(node), node.end_lineno or 0)
                        )
    return [
        DocumentedFunction(
            node.name, *halves, tuple(dict.fromkeys(tests[node.name])), document.name
        )
        for document, tree in trees
        for node in _functions(tree)
        if not node.name.startswith("test") and (halves := _halves(document.text, node, shortest))
    ]


def parsed(source: str) -> ast.Module | None:
    """Return the syntax tree of Python source, None if it does not parse."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield functions and methods, without functions nested in them."""
    for node in tree.body:
        for inner in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(inner, ast.FunctionDef):
                yield inner


def _called_names(node: ast.FunctionDef) -> set[str]:
    calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
    return {
        f.id if isinstance(f, ast.Name) else f.attr
        for f in calls
        if isinstance(f, ast.Name | ast.Attribute)
    }


def _halves(text: str, node: ast.FunctionDef, shortest: int) -> tuple[str, str] | None:
    """Return header and body of a documented function, None for other functions."""
    if ast.get_docstring(node) is None or len(node.body) < 2:
        return None
    end = node.body[0].end_lineno or 0
    last = node.end_lineno or 0
    if last - end < shortest or node.body[1].lineno <= end:
        return None
    return _lines(text, _first_line(node), end) + "\n", _lines(text, end + 1, last)


def _first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _lines(text: str, first: int, last: int) -> str:
    """Return lines first to last (from 1) as `ast` counts them: only newlines end a line, form
    feeds and the like do not.
    """
    return "\n".join(text.split("\n")[first - 1 : last])
