"""Questions depend only on the source: answers are in it, the same text gives the same questions,
and odd text breaks nothing.
"""

import ast
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deepseek.data import Document, read_folder, read_records
from deepseek.data.builders.facts import (
    common_length,
    first_sentence,
    is_right,
    sentences,
    shortened,
    tokens_of,
)
from deepseek.data.builders.phrasings import CODE, PROSE, RESERVED, language_of
from deepseek.data.builders.prose_facts import sections
from deepseek.data.builders.questions import (
    MOST_PER_DOCUMENT,
    TURNS,
    Question,
    all_questions,
    conversations,
)

SOURCE = '''"""Stacks. More than one."""

LIMIT = 1_000

class Stack(Base):
    """A pile of things, e.g. plates. The last is the first.

    Args:
        items: what lies on it,
            from the bottom up.
    """

    depth: int = 7

    def __init__(self, items, size=3):
        pass

    def peek(self, place: int = -1, *, strict: bool = True, note=None) -> Item:
        """Return the top.

        Args:
            place (int): counted from the top.
            strict: complain about an empty one.
        """
        raise EmptyError("empty")

def push(item, where="top"):
    """Put `item` on it.
    Args:
        where: which end.
    """
'''

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
names = st.sampled_from(["a/b.py", "b.py", "a/c.js", "a/d/e.md", "r@12", "x.jsonl:3"])
kinds = st.sampled_from(["code", "text", "commit"])


def by_kind(
    text: str, name: str = "repo/src/stack.py", kind: str = "code"
) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for question in all_questions([Document(text, name, kind)]):
        found.setdefault(question.kind, []).append(question)
    return found


def test_what_python_states_is_asked_for() -> None:
    found = by_kind(SOURCE)
    purposes = {question.answer: question.check for question in found["purpose"]}
    assert purposes["A pile of things, e.g. plates. The last is the first."] == (
        "A pile of things, e.g. plates.",
    )
    assert {q.check for q in found["default"]} == {("7",), ("3",), ("-1",), ("True",), ("'top'",)}
    assert {q.answer for q in found["returns"]} == {"`Stack.peek` returns `Item`."}
    assert [q.check for q in found["raises"]] == [("EmptyError",)]
    assert [q.check for q in found["bases"]] == [("Base",)]
    assert ("place", "strict", "note") in {q.check for q in found["arguments"]}
    assert "what lies on it, from the bottom up." in {q.answer for q in found["argument"]}
    assert "counted from the top." in {q.answer for q in found["argument"]}
    assert {q.check for q in found["location"]} == {("src/stack.py",)}
    assert {q.answer for q in found["constant"]} == {"`LIMIT` is `1000`."}
    assert "Put `item` on it." in purposes and "which end." in {q.answer for q in found["argument"]}
    assert found["module"][0].answer == "Stacks. More than one."
    assert "`push(item, where='top')`" in {q.answer for q in found["signature"]}


def test_other_languages_give_places_and_comments() -> None:
    text = "// Adds two numbers.\n// @param a one\nexport async function add(a, b) {\n}\n\nfn hidden() {}\n"
    found = by_kind(text, "repo/src/add.js")
    assert [q.answer for q in found["purpose"]] == ["Adds two numbers."]
    assert len(found["location"]) == 2


def test_a_commit_is_its_message_and_its_changes() -> None:
    text = (
        "Stacks have a limit\n\nA full stack made the program wait for ever; now it complains.\n\n"
        "--- a/stack.py\n+++ a/stack.py\n@@ class Stack\n+def depth(self):\n+    return 3\n"
        "--- old.py\n+++ /dev/null\n@@\n-x = 1\n"
    )
    found = by_kind(text, "repo@123", "commit")
    assert (
        found["commit"][0].answer
        == "A full stack made the program wait for ever; now it complains."
    )
    assert found["commit functions"][0].check == ("depth",)
    assert "Stacks have a limit" in found["commit"][0].question


@pytest.mark.parametrize(
    ("language", "text", "ways"),
    [
        (
            "en",
            "## Trees\n\nThe forest is a set of trees that do not touch each other. It can be empty.\n",
            "Trees",
        ),
        (
            "de",
            "Bäume\n=====\n\nEin Wald ist eine Menge von Bäumen, die sich nicht berühren. Das ist die Regel.\n",
            "Bäume",
        ),
        (
            "fr",
            "# Arbres\n\nUne forêt est un ensemble d'arbres qui ne se touchent pas dans le graphe.\n",
            "Arbres",
        ),
        (
            "es",
            "# Árboles\n\nUn bosque es un conjunto de árboles que no se tocan en el grafo de la red.\n",
            "Árboles",
        ),
        (
            "it",
            "# Alberi\n\nUna foresta è un insieme di alberi che non si toccano nel grafo della rete.\n",
            "Alberi",
        ),
        (
            "pt",
            "# Árvores\n\nUma floresta é um conjunto de árvores que não se tocam no grafo da rede.\n",
            "Árvores",
        ),
        (
            "zh",
            "# 树\n\n森林是由互不相交的树组成的集合，它可以是空集，也可以只含有一棵树，还可以含有许多棵不同的树。\n",
            "树",
        ),
        (
            "ja",
            "# 木\n\n森とは互いに交わらない木の集まりです。空であることもあります。木が一本だけのこともあります。\n",
            "木",
        ),
    ],
)
def test_prose_is_asked_about_in_its_own_language(language: str, text: str, ways: str) -> None:
    assert language_of(text) == language
    found = by_kind(text, "folder/a.md", "text")
    asked = found["section"][0]
    assert asked.question in {
        way.replace("{what}", ways) for way in PROSE["section"][language][:-RESERVED]
    }
    assert asked.paraphrase in {
        way.replace("{what}", ways) for way in PROSE["section"][language][-RESERVED:]
    }
    assert len(found["definition"]) == 1


def test_an_unknown_language_only_quotes() -> None:
    text = "# Metsä\n\nJoukko puita, jotka eivät kosketa toisiaan missään kohdassa verkkoa ollenkaan.\n"
    asked = by_kind(text, "folder/a.md", "text")["section"][0]
    assert asked.question.strip('":? ') == "Metsä"


def test_lists_are_asked_for_whole() -> None:
    text = (
        "## Colours\n\nThe flag has these:\n\n- dark red\n- pale blue\n\n## Long\n\n- a\n  b\n- c\n"
    )
    found = by_kind(text, "folder/a.md", "text")
    assert [q.check for q in found["items"]] == [("dark red", "pale blue")]
    assert "section" not in found


def test_a_numbered_line_is_a_heading_unless_another_one_is_next_to_it() -> None:
    paragraph = "Every token is sent to the experts that score it highest, two at the most."
    text = f"1. Routing\n\n{paragraph}\n\n2.1 Pools\n\n{paragraph}\n\n1. Open\n\n2. Close\n\n{paragraph}\n"
    assert [heading for heading, _ in sections(text)] == ["Routing", "Pools"]
    blocks = [len(blocks) for _, blocks in sections(text)]
    assert blocks == [1, 4]  # the list and what follows it belong to the section


@quick
@given(text=st.text(max_size=400), name=names, kind=kinds)
@example(text="def f(x=" + "-" * 900 + "1): pass", name="a/b.py", kind="code")
@example(text="x = '\ud800'", name="a/b.py", kind="code")
@example(text="# \n\n#\n===\n\n- \n-", name="a/d/e.md", kind="text")
def test_any_text_is_read(text: str, name: str, kind: str) -> None:
    document = Document(text, name, kind)
    assert all_questions([document]) == all_questions([document])


lines = st.sampled_from(
    [
        *SOURCE.split("\n"),
        "# Head",
        "Some words that say what a stack is for, at length.",
        "- item",
        "",
        "--- a",
        "+++ a",
    ]
)


@quick
@given(text=st.lists(lines, max_size=30).map("\n".join), name=names, kind=kinds)
def test_answers_are_taken_from_the_text(text: str, name: str, kind: str) -> None:
    said = set(tokens_of(f"{text} {name}"))
    for question in all_questions([Document(text, name, kind)]):
        assert is_right(question.answer, question.check)
        assert not is_right(question.question, question.check) and not is_right(
            question.paraphrase, question.check
        )
        assert question.question != question.paraphrase
        assert all(set(tokens_of(part)) <= said | set("()=.->") for part in question.check)
        assert Question.of_record(question.record()) == question


def test_this_package_answers_thousands_of_questions_and_none_twice() -> None:
    documents = list(read_folder(Path(__file__).parents[3] / "deepseek" / "data"))
    questions = all_questions(documents)
    assert len(questions) > 300 and len({question.question for question in questions}) > 0.99 * len(
        questions
    )
    asked = {question.question for question in questions}
    assert not asked & {question.paraphrase for question in questions}
    assert max(sum(q.source == d.name for q in questions) for d in documents) <= MOST_PER_DOCUMENT
    values = {question.check[0] for question in questions if question.kind == "default"}
    assert all(ast.parse(value, mode="eval") for value in values)


def test_a_name_in_two_places_is_asked_for_with_its_file() -> None:
    documents = [Document(SOURCE, f"repo/src/{name}.py", "code") for name in "ab"]
    questions = [
        question
        for question in all_questions(documents)
        if question.kind not in ("module", "constant")
    ]
    assert questions and all(f"src/{q.source[-4]}.py" in q.question for q in questions)


def test_conversations_hold_every_question_once_and_one_source_each() -> None:
    questions = all_questions([Document(SOURCE, f"repo/src/{name}.py", "code") for name in "ab"])
    documents = list(conversations(questions))
    turns = [document.messages() for document in documents]
    assert sorted(m["content"] for t in turns for m in t[::2]) == sorted(
        q.question for q in questions
    )
    assert {len(t) for t in turns} <= {2 * n for n in range(1, TURNS + 1)} and len(
        {len(t) for t in turns}
    ) > 1
    assert len({document.name for document in documents}) == len(documents)


@pytest.mark.parametrize(
    ("answer", "check", "right"),
    [
        ("It is `4`.", ("4",), True),
        ("It is 14.", ("4",), False),
        ("It is -4.", ("4",), False),
        ("It is 0.4.", ("4",), False),
        ("4e-3", ("4e-3",), True),
        ("It is 8,192", ("8192",), True),
        ("the FILE", ("'file'",), True),
        ("the files", ("file",), False),
        ("see data/text/git.py.", ("data/text/git.py",), True),
        ("see data/digit.py", ("data/git.py",), False),
        ("`a` and `c`", ("a", "b"), False),
        ("`b` and `a`", ("a", "b"), True),
        (
            "Return every token of a long text in order.",
            ("Return the tokens of a long text, in order.",),
            True,
        ),
        (
            "order in text long a of token every Return",
            ("Return the tokens of a long text, in order.",),
            False,
        ),
        ("x " * 70 + "4", ("4",), False),
        ("森是由树组成的集合", ("森是由树组成的集合。",), True),
        ("", ("4",), False),
        ("anything", (), False),
        ("anything", ("",), False),
    ],
)
def test_a_right_answer_states_all_of_the_check(
    answer: str, check: tuple[str, ...], right: bool
) -> None:
    assert is_right(answer, check) is right


@quick
@given(answer=st.text(max_size=80), parts=st.lists(st.text(max_size=20), max_size=3))
def test_any_answer_can_be_judged(answer: str, parts: list[str]) -> None:
    is_right(answer, parts)


@quick
@given(st.text(alphabet="abc", max_size=12), st.text(alphabet="abc", max_size=12))
def test_the_common_length_is_symmetric_and_bounded(first: str, second: str) -> None:
    length = common_length(first, second)
    assert length == common_length(second, first) <= min(len(first), len(second))
    assert common_length(first, first) == len(first)


@quick
@given(st.text(max_size=300))
def test_sentences_join_to_the_text(text: str) -> None:
    assert "".join(sentences(text)).replace(" ", "") == "".join(" ".join(text.split()).split(" "))
    assert len(shortened(text)) <= 320
    assert shortened(text).startswith(first_sentence(text)) or not shortened(text)


def test_every_kind_keeps_a_way_for_evaluation() -> None:
    for ways in [
        *CODE.values(),
        *(ways for languages in PROSE.values() for ways in languages.values()),
    ]:
        assert len(set(ways)) == len(ways) > RESERVED + 1


def test_a_literal_that_is_no_unicode_text_makes_no_question() -> None:
    source = 'def is_half(text):\n    """Return whether \\ud800 occurs in the text."""\n'
    for question in all_questions([Document(source, "a.py", "code")]):
        json.dumps(question.messages(), ensure_ascii=False).encode()


def test_documents_of_the_same_name_are_all_asked_about() -> None:
    sources = [SOURCE, SOURCE.replace("class ", "class Other").replace("def ", "def other_")]
    alone = [len(all_questions([Document(source, "a.py", "code")])) for source in sources]
    both = all_questions([Document(source, "a.py", "code") for source in sources])
    assert len(both) > max(alone) > 0


def test_the_command_writes_conversations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepseek.cli.main import main

    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "stack.py").write_text(SOURCE)
    out = tmp_path / "q.jsonl"
    with pytest.raises(SystemExit) as stop:
        main(["data", "questions", "--from-folder", str(tmp_path / "src"), "--out", str(out)])
    assert not stop.value.code and "records in" in capsys.readouterr().out
    assert all(document.kind == "messages" for document in read_records(out))
    (tmp_path / "src" / "stack.py").write_text("x = y()\n")
    with pytest.raises(SystemExit) as stop:
        main(["data", "questions", "--from-folder", str(tmp_path / "src"), "--out", str(out)])
    assert stop.value.code == 2 and "Nothing is documented" in capsys.readouterr().err
