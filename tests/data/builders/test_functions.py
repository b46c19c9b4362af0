"""Functions cut from source: header and body give the source again; tests find their function."""

import ast
from pathlib import Path

from deepseek.data import read_folder
from deepseek.data.builders.functions import documented_functions
from deepseek.data.text.document import Document

SOURCE = '''
import functools

class Stack:
    @functools.cache
    def peek(self):
        """Return the top."""
        top = self.items[-1]
        return top

def add(a, b):
    """Return a + b.

    >>> add(1, 2)
    3
    """
    total = a + b
    return total

def bare(x):
    return x

def short(x):
    """One line."""
    return x
'''
TESTS = "def test_add():\n    assert add(1, 2) == 3\n\ndef test_other():\n    assert other(1)\n"


def test_documented_functions_come_with_their_tests() -> None:
    documents = [
        Document(SOURCE, "m.py", "code"),
        Document(TESTS, "test_m.py", "code"),
        Document("x", "a.txt"),
    ]
    peek, add = documented_functions(documents)
    assert (peek.name, add.name) == ("peek", "add")
    assert peek.header.startswith("    @functools.cache\n    def peek") and peek.header.endswith(
        'the top."""\n'
    )
    assert add.body == "    total = a + b\n    return total"
    assert add.tests == ("def test_add():\n    assert add(1, 2) == 3",) and peek.tests == ()
    assert ast.parse(add.text)


def test_every_function_of_the_package_is_its_header_and_body() -> None:
    documents = list(read_folder(Path(__file__).parents[3] / "deepseek" / "data"))
    texts = {document.name: document.text for document in documents}
    found = documented_functions(documents)
    assert len(found) > 40
    assert all(f.header + f.body in texts[f.where] for f in found)


def test_what_does_not_parse_is_left_out() -> None:
    assert documented_functions([Document("def f(:\n", "m.py", "code")]) == []
