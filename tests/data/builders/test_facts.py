"""Facts are stated by their document, and any text is read in linear time."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.data import Document
from deepseek.data.builders.code_facts import code_facts
from deepseek.data.builders.facts import Fact, sentences
from deepseek.data.builders.prose_facts import commit_facts, heading_of, prose_facts

SECONDS = 2.0
"""Much more than any of these texts takes, and much less than quadratic time would."""


def of_kind(facts: Callable[[Document], object], document: Document, kind: str) -> list[Fact]:
    return [fact for fact in facts(document) if fact.kind == kind]


def raised(body: str) -> tuple[str, ...]:
    """Return the exceptions that the facts say a function with this body raises."""
    lines = body.replace("\n", "\n    ")
    source = Document(f"def load(path):\n    {lines}\n", "a.py", "code")
    return next((fact.check for fact in of_kind(code_facts, source, "raises")), ())


HOSTILE = {
    "heading": (prose_facts, Document("# a" + " " * 200_000 + "x", "a.md")),
    "abbreviations": (
        prose_facts,
        Document("A forest is a set of trees. " + "a. " * 66_000, "a.md"),
    ),
    "comment": (
        code_facts,
        Document("// a" + " " * 200_000 + "x\nfunction walk() {}\n", "a.js", "code"),
    ),
    "argument": (
        code_facts,
        Document(f'def f(a):\n    """F.\n\n    :param{" " * 4000}:\n    """\n', "a.py", "code"),
    ),
    "arguments": (
        code_facts,
        Document(
            'def f(a):\n    """F.\n\n' + "     :param a: b\n" * 10_000 + '    end"""\n',
            "a.py",
            "code",
        ),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_read_in_time(name: str) -> None:
    facts, document = HOSTILE[name]
    begun = time.process_time()
    list(facts(document))
    assert time.process_time() - begun < SECONDS


def test_a_row_of_abbreviations_is_one_sentence_in_time() -> None:
    begun = time.process_time()
    assert sentences("a. " * 66_000 + "end.") == ["a. " * 66_000 + "end."]
    assert time.process_time() - begun < SECONDS


@given(st.integers(1, 6), st.sampled_from("#="), st.integers(1, 9), st.integers(0, 9))
def test_a_marked_heading_may_be_closed(level: int, sign: str, spaces: int, closing: int) -> None:
    line = f"{sign * level}{' ' * spaces}The forest{' ' * spaces}{sign * closing}"
    assert heading_of(f"{line}\ntext") == ("The forest", "text")


def test_a_function_whose_signature_changed_is_not_new() -> None:
    changes = (
        "Fetch again\n\n--- a.py\n+++ a.py\n@@\n-def fetch(url):\n+def fetch(url, retries=3):\n"
        "+def wait(seconds):\n+    pass\n--- b.py\n+++ b.py\n@@\n-async def moved():\n"
        "--- c.py\n+++ c.py\n@@\n+async def moved():\n+def test_wait():\n+def _hidden():\n"
    )
    (fact,) = of_kind(commit_facts, Document(changes, "r@1", "commit"), "commit functions")
    assert fact.check == ("wait",)


def test_a_blank_line_before_a_function_adds_none() -> None:
    text = "As PEP 8 asks\n\n--- a.py\n+++ a.py\n@@\n x = 1\n+\n+\n def save():\n     pass\n"
    assert of_kind(commit_facts, Document(text, "r@1", "commit"), "commit functions") == []


names = st.lists(st.sampled_from("abcdef"), max_size=4, unique=True)


@given(added=names, removed=names)
def test_only_names_that_were_not_there_are_new(added: list[str], removed: list[str]) -> None:
    lines = [f"-def {name}(x):" for name in removed] + [f"+def {name}(y):" for name in added]
    text = "\n".join(["Change", "", "--- a.py", "+++ a.py", "@@", *lines, ""])
    facts = of_kind(commit_facts, Document(text, "r@1", "commit"), "commit functions")
    new = [name for name in added if name not in removed]
    assert [fact.check for fact in facts] == ([tuple(new)] if new else [])


def test_the_files_of_a_commit_are_not_asked_for() -> None:
    """Its document may lack some: lock files, images, held-out files."""
    text = "Change\n\n--- a.py\n+++ a.py\n@@\n+x = 1\n"
    facts = list(commit_facts(Document(text, "r@1", "commit")))
    assert facts == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise OneError", ("OneError",)),
        ("if path:\n    raise OneError()\nraise TwoError", ("OneError", "TwoError")),
        ("def inner():\n    raise OneError\nreturn inner", ()),
        ("async def inner():\n    raise OneError\nreturn inner", ()),
        ("class Inner:\n    def read(self):\n        raise OneError\nreturn Inner", ()),
        ("try:\n    raise OneError\nexcept OneError:\n    return 1", ()),
        ("try:\n    raise OneError\nexcept* OneError:\n    pass", ()),
        ("try:\n    pass\nexcept OneError:\n    raise TwoError from None", ("TwoError",)),
        ("try:\n    pass\nexcept OneError:\n    pass\nelse:\n    raise TwoError", ("TwoError",)),
        ("try:\n    raise OneError\nfinally:\n    raise TwoError", ("OneError", "TwoError")),
        ("with path:\n    for a in b:\n        raise OneError", ("OneError",)),
    ],
)
def test_only_what_a_function_raises_itself_and_does_not_catch_is_said(
    body: str, expected: tuple[str, ...]
) -> None:
    assert raised(body) == expected


@pytest.mark.parametrize(
    ("head", "section", "is_argument"),
    [
        ("class Box:", "Attributes", False),
        ("class Box:", "Fields", False),
        ("class Box:", "Args", True),
        ("@dataclass\nclass Box:", "Attributes", True),
        ("@dataclass(frozen=True)\nclass Box:", "Fields", True),
        ("@dataclasses.dataclass\nclass Box:", "Attributes", True),
    ],
)
@pytest.mark.parametrize("init", [False, True])
def test_attributes_are_arguments_of_dataclasses_alone(
    head: str, section: str, is_argument: bool, init: bool
) -> None:
    source = (
        f'{head}\n    """A box.\n\n    {section}:\n        size: its width in metres.\n    """\n'
    )
    source += "    def __init__(self, other):\n        pass\n" * init
    found = of_kind(code_facts, Document(source, "a.py", "code"), "argument")
    expected = is_argument and (section == "Args" or not init)
    assert [fact.argument for fact in found] == (["size"] if expected else [])


def test_arguments_in_sphinx_style_are_read_one_by_one() -> None:
    source = 'def f(a, b):\n    """F.\n\n    :param a: the\n        first one.\n'
    source += '    :param list[int] b: the second one.\n    """\n'
    found = of_kind(code_facts, Document(source, "a.py", "code"), "argument")
    assert [(fact.argument, fact.answer) for fact in found] == [
        ("a", "the first one."),
        ("b", "the second one."),
    ]


REST = "它可以是空集，也可以只含有一棵树，还可以含有许多棵不同的树，这些树互不相交。"
REST_JA = "空であることもあります。木が一本だけのこともあります。"


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        (f"森林是由互不相交的树组成的集合。{REST}", ["森林"]),
        (f"这个方法是由互不相交的树组成的。{REST}", []),
        (f"该函数是一个互不相交的集合。{REST}", []),
        (f"森林とは互いに交わらない木の集まりです。{REST_JA}", ["森林"]),
        (f"この方法は互いに交わらない木の集まりです。{REST_JA}", []),
        (f"それらは互いに交わらない木の集まりです。{REST_JA}", []),
    ],
)
def test_what_points_back_is_no_term(text: str, terms: list[str]) -> None:
    found = of_kind(prose_facts, Document(f"# 一\n\n{text}\n", "a.md"), "definition")
    assert [fact.what for fact in found] == terms
