"""What a run learns from a repository split by time knows nothing that came later."""

from pathlib import Path

import pygit2
import pytest
from tiny_tokenizer import tiny_tokenizer

from deepseek.errors import DataError
from deepseek.train.corpus import Source, build_corpus


def commit(repository: pygit2.Repository, name: str, text: str, time: int) -> None:
    """Write a file and commit it at `time`."""
    (Path(repository.workdir) / name).write_text(text)
    repository.index.add(name)
    author = pygit2.Signature("a", "a@example.org", time)
    parents = [] if repository.head_is_unborn else [repository.head.target]
    repository.create_commit("HEAD", author, author, f"add {name}", repository.index.write_tree(), parents)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Ten commits that each add a file; the last one also rewrites the first file."""
    made = pygit2.init_repository(tmp_path / "repo")
    for number in range(10):
        commit(
            made, f"f{number}.py", f"def function_{number}(value):\n    return value + {number}\n" * 5, 1000 + number
        )
    commit(made, "f0.py", "SECRET_OF_THE_FUTURE = True\n" * 5, 2000)
    return tmp_path / "repo"


def test_the_past_knows_nothing_of_the_future(repository: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    corpus = build_corpus(Source(git=repository, by="time", held_out=0.3), tokenizer, tmp_path / "corpus")
    past, future = (
        tokenizer.decode([int(i) & 0x7FFFFFFF for i in shards.ids_N]) for shards in (corpus.train, corpus.held_out)
    )
    assert "SECRET_OF_THE_FUTURE" not in past and "function_0" in past
    assert "SECRET_OF_THE_FUTURE" in future and "function_9" in future and "function_9" not in past


def test_time_needs_git_alone(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="git repository alone"):
        build_corpus(Source(git=repository, folder=tmp_path, by="time"), tiny_tokenizer(), tmp_path / "corpus")


def test_by_time_what_stops_a_run_is_older_than_what_is_reported(repository: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    source = Source(git=repository, by="time", held_out=0.5)
    corpus = build_corpus(source, tokenizer, tmp_path / "corpus", validation=True)
    assert corpus.validation is not None
    past, middle, last = (
        tokenizer.decode([int(i) & 0x7FFFFFFF for i in shards.ids_N])
        for shards in (corpus.train, corpus.validation, corpus.held_out)
    )
    assert "SECRET_OF_THE_FUTURE" in last and "SECRET_OF_THE_FUTURE" not in middle + past
    assert "function_9" in last and "function_9" not in middle + past
    newest = [max(number for number in range(10) if f"function_{number}" in text) for text in (past, middle, last)]
    assert newest == sorted(set(newest))
