"""A tiny tokenizer and git repositories to read."""

from collections.abc import Callable
from pathlib import Path

import pygit2
import pytest
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

Commit = Callable[..., str]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer."""
    return tiny_tokenizer()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """An empty git repository with an origin."""
    folder = tmp_path / "checkout"
    repository = pygit2.init_repository(folder)
    repository.remotes.create("origin", "https://example.org/team/engine.git")
    return folder


@pytest.fixture
def commit(repository: Path) -> Commit:
    """`commit(files, message, time, parents=None)` writes files (None deletes), commits and returns
    the id.
    """

    def write(
        files: dict[str, str | bytes | None],
        message: str,
        time: int,
        parents: list[str] | None = None,
    ) -> str:
        repo = pygit2.Repository(repository)
        for name, content in files.items():
            path = repository / name
            if content is None:
                repo.index.remove(name)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            repo.index.add(name)
        repo.index.write()
        who = pygit2.Signature("A", "a@example.org", time, 0)
        before = [repo.head.target] if not repo.head_is_unborn else []
        others = [pygit2.Oid(hex=parent) for parent in parents or []]
        return str(
            repo.create_commit(
                "HEAD", who, who, message, repo.index.write_tree(), [*before, *others]
            )
        )

    return write
