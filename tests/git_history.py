"""Git repositories written by tests, with a whole tree for each commit."""

from dataclasses import dataclass
from pathlib import Path

import pygit2
from pygit2.enums import FileMode

from deepseek.data.text.git_diffs import Repository

Files = dict[str, str]
"""Text of each path."""


@dataclass
class History:
    """A repository `engine` whose commits are written as whole trees."""

    path: Path
    time: int = 100
    lines: int = 0

    def __post_init__(self) -> None:
        pygit2.init_repository(self.path, initial_head="main")
        self.repository = Repository(str(self.path))
        self.repository.remotes.create("origin", "https://example.org/engine.git")

    def new_lines(self, count: int) -> str:
        """Return lines that no file has had before."""
        self.lines += count
        return "".join(f"line_{self.lines - number}\n" for number in range(count))

    def commit(self, files: Files, *parents: pygit2.Oid, message: str = "change") -> pygit2.Oid:
        """Commit files after `parents`, by default after the last commit, and return the id."""
        index = pygit2.Index()
        for path, text in files.items():
            blob = self.repository.create_blob(text.encode())
            index.add(pygit2.IndexEntry(path, blob, FileMode.BLOB))
        self.time += 1
        who = pygit2.Signature("A", "a@example.org", self.time)
        if not parents and not self.repository.head_is_unborn:
            parents = (self.head.id,)
        tree = index.write_tree(self.repository)
        made = self.repository.create_commit(None, who, who, message, tree, list(parents))
        self.repository.references.create("refs/heads/main", made, force=True)
        return made

    @property
    def head(self) -> pygit2.Commit:
        """The last commit."""
        return self.repository[self.repository.head.target].peel(pygit2.Commit)
