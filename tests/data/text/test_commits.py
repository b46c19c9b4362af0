"""A commit's changes are on the same side of the split as the changed files, across renames."""

import random
import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pygit2
import pytest
from git_history import Files, History
from hypothesis import given, settings
from hypothesis import strategies as st
from pygit2.enums import DiffFind

from deepseek.data import Document, clean, read_git, split
from deepseek.data.text.commits import (
    FileSides,
    follow_files,
    moved,
    renamed_files,
    with_later_names,
)
from deepseek.data.text.document import KnownNames, Rule, draw_lots

LINE = re.compile(r"line_\d+")


def renamed(history: History) -> list[tuple[str, str]]:
    """Return the old and new paths of renamed files."""
    names = renamed_files(history.repository, history.head)
    return [(old.removeprefix("engine/"), new.removeprefix("engine/")) for old, new in names]


def sides(history: History, *held_out: str) -> tuple[list[Document], list[Document]]:
    """Return both sides if these files and a tenth of the deleted ones are held out."""
    documents, report = clean(read_git(history.path))
    test = frozenset(d for d in documents if d.name.removeprefix("engine/") in held_out)
    train = [document for document in documents if document not in test]
    lots = draw_lots(documents, 0.1, "file", 0)
    names = renamed_files(history.repository, history.head)
    files = FileSides(train, test, lots, names, report.duplicates)
    return follow_files(documents, test, files)


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "checkout")


def lines_of(documents: Iterable[Document]) -> set[str]:
    return {line for document in documents for line in LINE.findall(document.text)}


def change(files: Files, history: History, draw: random.Random) -> Files:
    """Return the files after some were changed, renamed, deleted and added; no name is reused."""
    changed = dict(files)
    for path in draw.sample(sorted(files), k=min(3, len(files))):
        text = changed.pop(path)
        if draw.random() < 0.6:
            text = history.new_lines(2) + text
        if draw.random() < 0.4:
            path = f"{draw.choice('abc')}/renamed_{history.lines}_{path.replace('/', '_')}"
        if draw.random() < 0.8:
            changed[path] = text
    return changed | {f"{draw.choice('abc')}/{history.time}.py": history.new_lines(9)}


@settings(max_examples=15)
@given(st.randoms(use_true_random=False), st.integers(0, 9), st.sampled_from(["file", "directory"]))
def test_no_line_is_on_both_sides(draw: random.Random, seed: int, by: Rule) -> None:
    with TemporaryDirectory() as folder:
        history = History(Path(folder))
        tree = {f"{where}/{n}.py": history.new_lines(9) for where in "abc" for n in range(3)}
        for _ in range(8):
            history.commit(tree)
            tree = change(tree, history, draw)
        history.commit(tree | {"a/first.py": "a = 1\n", "b/second.py": "b = 1\n"})
        documents = list(read_git(history.path))
        train, held_out = split(documents, 0.4, by, seed)
        lots = draw_lots(documents, 0.4, by, seed)
        moved = renamed_files(history.repository, history.head)
        files = FileSides(train, held_out, lots, moved)
        after = follow_files(documents, frozenset(held_out), files)
    for drawn, side in zip((train, held_out), after, strict=True):
        assert [d for d in drawn if d.kind != "commit"] == [d for d in side if d.kind != "commit"]
        assert [d.name for d in side] == [d.name for d in documents if d.name in names(side)]
    assert names(after[0]) | names(after[1]) == names(documents)
    assert not names(after[0]) & names(after[1])
    assert not lines_of(after[0]) & lines_of(after[1])


def names(documents: Iterable[Document]) -> set[str]:
    return {document.name for document in documents}


def test_a_commit_of_both_sides_is_trained_on_without_what_is_held_out(history: History) -> None:
    files = {"a.py": "a = 1\n", "b.py": "b = 1\n", "c.py": "c = 1\n"}
    history.commit(files, message="add all")
    history.commit(files | {"b.py": "b = 2\n"}, message="change b")
    history.commit(files | {"b.py": "b = 2\n", "c.py": "c = 2\n"}, message="change c")
    train, held_out = sides(history, "b.py")
    assert [document.text for document in held_out] == [
        "b = 2\n",
        "change b\n\n--- b.py\n+++ b.py\n@@\n-b = 1\n+b = 2\n",
    ]
    assert [document.text for document in train if document.kind == "commit"] == [
        "change c\n\n--- c.py\n+++ c.py\n@@\n-c = 1\n+c = 2\n",
        "add all\n\n--- /dev/null\n+++ a.py\n@@\n+a = 1\n--- /dev/null\n+++ c.py\n@@\n+c = 1\n",
    ]


def test_what_has_no_changes_and_what_is_known_stays(history: History) -> None:
    history.commit({"a.py": "a = 1\n", "b.py": "b = 1\n"}, message="add both")
    a, b, both = read_git(history.path)
    message = Document("Only a message", "engine@1", "commit")
    other = Document("Only a message, held out", "engine@2", "commit")
    files = FileSides([a], [b], draw_lots([a, b], 0.5, "file", 0))
    documents = [a, b, both, message, other]
    train, held_out = follow_files(documents, frozenset([b, other]), files, {both.text_digest})
    assert (train, held_out) == ([a, both, message], [b, other])
    train, held_out = follow_files(documents, frozenset([b, both]), files, {both.text_digest})
    assert (train, held_out) == ([a, message, other], [b, both])


def test_former_names_are_followed_through_commits_that_are_too_large_to_read(
    history: History,
) -> None:
    text, other = history.new_lines(20), history.new_lines(20)
    rest = {"d.py": "d = 1\n"}
    history.commit(rest | {"a.py": text, "x.py": other})
    large = {f"n{number}.py": f"{number} = {number}\n" * 400 for number in range(20)}
    history.commit(rest | large | {"b.py": text, "y.py": other})
    history.commit(rest | large | {"c.py": text + "new = 1\n", "y.py": other})
    assert sorted(renamed(history)) == [("a.py", "b.py"), ("b.py", "c.py"), ("x.py", "y.py")]
    assert renamed(history)[0] == ("b.py", "c.py")
    train, held_out = sides(history, "c.py")
    assert lines_of(held_out) == set(LINE.findall(text))
    assert lines_of(train) == set(LINE.findall(other))


def test_a_name_that_was_a_held_out_file_s_is_held_out_even_if_given_again(
    history: History,
) -> None:
    text = history.new_lines(20)
    history.commit({"a.py": text, "c.py": "c = 1\n"})
    history.commit({"b.py": text, "c.py": "c = 1\n"})
    history.commit({"b.py": text, "c.py": "c = 1\n", "a.py": "a = 1\n"})
    train, held_out = sides(history, "b.py")
    assert "engine/a.py" in names(train) and not lines_of(train)
    assert lines_of(held_out) == set(LINE.findall(text))


def test_a_former_name_counts_on_other_branches_too(history: History) -> None:
    text, more = history.new_lines(20), history.new_lines(3)
    rest = {"c.py": "c = 1\n", "d.py": "d = 1\n"}
    root = history.commit(rest | {"a.py": text})
    ours = history.commit(rest | {"b.py": text}, root)
    theirs = history.commit(rest | {"a.py": text + more}, root)
    history.commit(rest | {"b.py": text + more}, ours, theirs)
    train, held_out = sides(history, "b.py")
    assert not lines_of(train)
    assert lines_of(held_out) == set(LINE.findall(text + more))


def test_every_moved_file_is_found_whatever_the_settings_say(history: History) -> None:
    text, other = history.new_lines(9), history.new_lines(9)
    places = {place: {f"{place}/{number}.py": text for number in range(1500)} for place in "ab"}
    history.commit(places["a"] | {"a/other.py": other})
    history.commit(places["b"] | {"b/other.py": other + history.new_lines(1)})
    history.repository.config["diff.renames"] = False
    moved = renamed(history)
    assert {former for former, _ in moved} == {*places["a"], "a/other.py"}
    assert {later for _, later in moved} == {*places["b"], "b/other.py"}


def test_a_module_that_leaves_an_import_behind_is_followed(history: History) -> None:
    text = history.new_lines(30)
    history.commit({"a.py": text, "other.py": history.new_lines(9)})
    moved_text = text + history.new_lines(1)
    history.commit({"a.py": "from b import *\n", "b.py": moved_text, "other.py": "line_0\n"})
    assert ("a.py", "b.py") in renamed(history)
    train, held_out = sides(history, "b.py")
    assert not lines_of(train) & set(LINE.findall(moved_text))
    assert lines_of(held_out) >= set(LINE.findall(moved_text))


def test_more_than_a_thousand_files_that_move_with_a_change_are_found(history: History) -> None:
    texts = {f"{number}.py": history.new_lines(8) for number in range(1100)}
    history.commit({f"a/{name}": text for name, text in texts.items()})
    history.commit({f"b/{name}": f"package b\n{text}" for name, text in texts.items()})
    assert len(renamed(history)) == 1100


def test_files_that_are_gone_are_on_one_side_each(history: History) -> None:
    gone = {f"gone_{number}.py": history.new_lines(9) for number in range(40)}
    rest = {"a.py": "a = 1\n", "b.py": "b = 1\n"}
    for count in range(40, -1, -5):
        left = list(gone.items())[:count]
        history.commit(rest | {path: f"{text}# {count}\n" for path, text in left})
    train, _ = sides(history, "b.py")
    files = [set(LINE.findall(text)) for text in gone.values()]
    assert {len(lines & lines_of(train)) for lines in files} == {0, 9}


@pytest.mark.parametrize("added", [0, 2])
def test_a_duplicate_that_was_dropped_is_on_the_side_of_its_text(
    history: History, added: int
) -> None:
    text = history.new_lines(60)
    rest = {"c.py": "c = 1\n"}
    history.commit(rest | {"a.py": text})
    files = rest | {"a.py": text, "b.py": text + history.new_lines(added)}
    history.commit(files)
    history.commit({path: text for path, text in files.items() if path != "b.py"})
    history.commit(files)
    for held_out in ("a.py", "c.py"):
        train, test = sides(history, held_out)
        assert names(train) | names(test) >= {"engine/a.py", "engine/c.py"}
        assert "engine/b.py" not in names(train) | names(test)
        assert not lines_of(train) & lines_of(test)
        assert (lines_of(test) if held_out == "a.py" else lines_of(train)) >= lines_of_text(text)


def lines_of_text(text: str) -> set[str]:
    return set(LINE.findall(text))


def test_a_merge_that_puts_another_project_into_a_folder_renames_its_files(
    history: History,
) -> None:
    project = {f"{number}.py": history.new_lines(20) for number in range(20)}
    imported = history.commit(project)
    history.repository.references.delete("refs/heads/main")
    ours = {"a.py": history.new_lines(20), "b.py": history.new_lines(20)}
    first = history.commit(ours)
    library = {f"lib/{path}": text for path, text in project.items()}
    library["lib/7.py"] += history.new_lines(1)
    history.commit(ours | library, first, imported)
    assert sorted(renamed(history)) == sorted((path, f"lib/{path}") for path in project)
    for held_out in ("lib/3.py", "lib/7.py"):
        train, test = sides(history, held_out)
        assert lines_of(test) >= lines_of_text(project[held_out.removeprefix("lib/")])
        assert not lines_of(train) & lines_of(test)


class UncomparableDiff:
    """A diff in which libgit2 can find only identical files, like that of a commit of `click`."""

    def __init__(self) -> None:
        file = SimpleNamespace(path="a.py")
        self.deltas: list[Any] = [SimpleNamespace(status_char=lambda: "A", new_file=file)]

    def find_similar(self, flags: int, rename_limit: int = 0) -> None:
        if not flags & DiffFind.FIND_EXACT_MATCH_ONLY:
            raise pygit2.GitError("unrecoverable internal error: 'delta_is_split(tgt)'")
        files = {"old_file": SimpleNamespace(path="b.py"), "new_file": SimpleNamespace(path="a.py")}
        self.deltas = [SimpleNamespace(status_char=lambda: "R", **files)]


def test_where_git_cannot_compare_contents_equal_files_are_followed() -> None:
    assert list(moved(UncomparableDiff())) == [("b.py", "a.py")]  # type: ignore[arg-type]


def test_a_merge_renames_alone_what_it_has_at_a_new_path(history: History) -> None:
    text, other, kept = (history.new_lines(20) for _ in range(3))
    root = history.commit({"a.py": text, "b.py": other, "c.py": kept})
    ours = history.commit({"a.py": text, "moved.py": other, "c.py": kept}, root)
    theirs = history.commit({"a.py": text, "b.py": other, "c.py": kept, "d.py": "d = 1\n"}, root)
    history.commit(
        {"new.py": text, "moved.py": other, "c.py": kept, "d.py": "d = 1\n"}, ours, theirs
    )
    assert set(renamed(history)) == {("a.py", "new.py"), ("b.py", "moved.py")}
    assert renamed(history).count(("b.py", "moved.py")) == 1


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdef")), max_size=8),
    st.sets(st.sampled_from("abcd")),
    st.sets(st.sampled_from("abcd")),
)
def test_later_names_are_on_the_side_of_known_ones(
    renamed: list[tuple[str, str]], learnt: set[str], tested: set[str]
) -> None:
    known = KnownNames(frozenset(learnt), frozenset(tested))
    names = with_later_names(known, renamed)
    for name in "abcdef":
        if known.is_held_out(name) is not None:
            assert names.is_held_out(name) == known.is_held_out(name)
    for former, later in renamed[:1]:
        assert (names.is_held_out(former) is None) or (names.is_held_out(later) is not None)
    assert with_later_names(KnownNames(), renamed) == KnownNames()


def test_names_are_followed_from_commit_to_commit() -> None:
    names = with_later_names(
        KnownNames(frozenset("ax"), frozenset("b")),
        [("c", "d"), ("b", "e"), ("a", "c"), ("b", "x")],
    )
    assert names == KnownNames(frozenset("acdx"), frozenset("be"))


@given(st.sampled_from(["\n", "\r", "\r\n", "\u2028"]), st.integers(0, 9))
def test_files_whose_names_have_line_breaks_are_followed_too(end: str, seed: int) -> None:
    with TemporaryDirectory() as folder:
        history = History(Path(folder))
        files = {f"a{end}{n}.py": history.new_lines(9) for n in range(8)}
        history.commit(files)
        history.commit({path: text + history.new_lines(1) for path, text in files.items()})
        documents = list(read_git(history.path))
        train, test = split(documents, 0.4, "file", seed)
        lots = draw_lots(documents, 0.4, "file", seed)
        after = follow_files(documents, frozenset(test), FileSides(train, test, lots))
    assert not lines_of(after[0]) & lines_of(after[1])
    assert len(lines_of(after[0]) | lines_of(after[1])) == 8 * 10
    assert all(len(document.name.splitlines()) == 1 for document in documents)
