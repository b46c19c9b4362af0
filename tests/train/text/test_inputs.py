"""Whether a run folder is resumed depends on the inputs that the run reads."""

from pathlib import Path

import pygit2
import pytest

from deepseek.data.text.filters import MAX_FILE_BYTES
from deepseek.errors import DataError
from deepseek.train.text.corpus import Source
from deepseek.train.text.inputs import text_digest


def commit(folder: Path, text: str) -> None:
    """Commit a file with this text, in a new repository if there is none."""
    repository = pygit2.init_repository(folder)
    (folder / "a.py").write_text(text)
    repository.index.add("a.py")
    repository.index.write()
    author = pygit2.Signature("A", "a@example.org")
    parents = [] if repository.head_is_unborn else [repository.head.target]
    tree = repository.index.write_tree()
    repository.create_commit("HEAD", author, author, text, tree, parents)


def test_a_history_that_grows_is_the_same_input(tmp_path: Path) -> None:
    commit(tmp_path / "one", "x = 1\n")
    before = text_digest(Source(git=tmp_path / "one"))
    commit(tmp_path / "one", "x = 2\n")
    assert text_digest(Source(git=tmp_path / "one")) == before
    commit(tmp_path / "two", "x = 1\n")
    assert text_digest(Source(git=tmp_path / "two")) != before


def test_a_folder_that_changes_is_another_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = text_digest(Source(folder=tmp_path))
    assert text_digest(Source(folder=tmp_path)) == before
    (tmp_path / "a.txt").write_text("two")
    changed = text_digest(Source(folder=tmp_path))
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({before, changed, text_digest(Source(folder=tmp_path))}) == 3


@pytest.mark.parametrize(("name", "counts"), [("a.pdf", True), ("a.txt", True), ("a.py", False)])
def test_a_file_counts_up_to_the_size_that_is_read(tmp_path: Path, name: str, counts: bool) -> None:
    (tmp_path / name).write_bytes(b"a" * 2 * MAX_FILE_BYTES)
    before = text_digest(Source(folder=tmp_path))
    (tmp_path / name).write_bytes(b"b" * 2 * MAX_FILE_BYTES)
    assert (text_digest(Source(folder=tmp_path)) != before) == counts


def test_what_the_run_writes_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = text_digest(Source(folder=tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("step 1")
    assert text_digest(Source(folder=tmp_path), without=[tmp_path / "run"]) == before


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone"):
        text_digest(Source(folder=tmp_path / "gone"))
