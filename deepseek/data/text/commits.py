"""Split the commits of a repository along with its files.

A diff shows the text of the files that a commit changed. What it changed therefore goes to the side
of these files, so that no held-out text is trained on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from types import MappingProxyType

import pygit2
from pygit2.enums import DiffFind, SortMode

from deepseek.data.text.document import Document, KnownNames, Lots
from deepseek.data.text.git import damage_explained, file_name, repository_name
from deepseek.data.text.git_diffs import Repository, find_exact_renames
from deepseek.data.text.patches import NOWHERE, Patch, message_and_patches

MOST_COMPARED = 5_000
"""Maximum files of one commit to look for under other names with similar content."""


def renamed_files(repository: Repository, commit: pygit2.Commit) -> Iterator[tuple[str, str]]:
    """Yield the former and the later name of each file that was renamed up to a commit, the newest
    renaming first.

    A file is renamed if a commit deletes it and adds one with at least half of its content. A merge
    renames files to paths that no parent has, such as one that moves another project into a folder.

    Args:
        repository: the repository.
        commit: the newest commit.
    """
    with damage_explained(repository.path):
        name = repository_name(repository)
        for ancestor in repository.walk(commit.id, SortMode.TOPOLOGICAL | SortMode.TIME):
            moves = (
                moved_by_merge(repository, ancestor)
                if len(ancestor.parents) > 1
                else moved(repository.diff_to_parent(ancestor))
            )
            for former_path, later_path in moves:
                yield file_name(name, former_path), file_name(name, later_path)


def moved(diff: pygit2.Diff) -> Iterator[tuple[str, str]]:
    """Yield the former and the later path of each file that a diff renames.

    A moved module may leave a stub at its former path that imports it from the new one.
    """
    if not added_paths(diff):
        return
    # Comparing contents takes time in proportion to the square of the number of files, so exact
    # renames are found first.
    find_exact_renames(diff)
    flags = DiffFind.FIND_RENAMES | DiffFind.FIND_RENAMES_FROM_REWRITES
    with suppress(pygit2.GitError):  # libgit2 fails on some diffs of files that are split
        diff.find_similar(flags=flags, rename_limit=MOST_COMPARED)
    for delta in diff.deltas:
        if delta.status_char() == "R":
            yield delta.old_file.path, delta.new_file.path


def moved_by_merge(repository: Repository, merge: pygit2.Commit) -> Iterator[tuple[str, str]]:
    """Yield the former and the later path of each file that a merge itself renames.

    Most merges have no path of their own, and then no contents are compared.
    """
    diffs = [repository.changes(parent, merge) for parent in merge.parents]
    new_paths = set.intersection(*map(added_paths, diffs))
    if not new_paths:
        return
    for diff in diffs:
        for former_path, later_path in moved(diff):
            if later_path in new_paths:
                yield former_path, later_path


def added_paths(diff: pygit2.Diff) -> set[str]:
    """Return the paths that a diff adds."""
    return {delta.new_file.path for delta in diff.deltas if delta.status_char() == "A"}


def with_later_names(known: KnownNames, renames: Sequence[tuple[str, str]]) -> KnownNames:
    """Return known names and those that the same files were given later.

    Args:
        known: names of files whose side is known. A later name that is known itself keeps its side.
        renames: former and later names of files, newest first (`renamed_files`).
    """
    train_names = set(known.learnt)
    test_names = set(known.tested)
    for former_name, later_name in reversed(renames):
        if known.is_held_out(later_name) is not None:
            continue
        if former_name in train_names:
            train_names.add(later_name)
        elif former_name in test_names:
            test_names.add(later_name)
    return KnownNames(frozenset(train_names), frozenset(test_names))


class FileSides:
    """The side of the split of each file that a repository has or had.

    Args:
        train: training documents.
        held_out: held-out documents.
        lots: lots of the split, which give files that are gone a side too.
        renamed: former and later names of files, newest first (`renamed_files`). Both names are on
            the same side.
        duplicates: names of files that were dropped, each with the name of the same text that was
            retained (`CleanReport.duplicates`). Both are on the same side.
    """

    def __init__(
        self,
        train: Iterable[Document],
        held_out: Iterable[Document],
        lots: Lots,
        renamed: Iterable[tuple[str, str]] = (),
        duplicates: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._train = {document.name for document in train}
        self._held_out = {document.name for document in held_out}
        self._lots = lots
        for name, known_name in chain(duplicates.items(), renamed):
            side = self._held_out if self.is_held_out(known_name) else self._train
            side.add(name)

    def is_held_out(self, name: str) -> bool:
        """Return whether a file that has or had this name is held out."""
        if name in self._held_out or name in self._train:
            return name in self._held_out
        return self._lots.is_held_out(name)


def follow_files(
    documents: Iterable[Document],
    held_out: AbstractSet[Document],
    files: FileSides,
    known: AbstractSet[str] = frozenset(),
) -> tuple[list[Document], list[Document]]:
    """Return training and held-out documents, each commit on the side of the files it changed.

    A commit that changed files of both sides is trained on without the changes of held-out files.
    One without changes stays where it is.

    Args:
        documents: all documents; their order is retained.
        held_out: those that the split holds out.
        files: sides of the files.
        known: digests of texts (`Document.text_digest`) that stay where they are, as a whole.
    """
    train: list[Document] = []
    test: list[Document] = []
    for document in documents:
        side = test if document in held_out else train
        if document.kind != "commit" or document.text_digest in known:
            side.append(document)
            continue
        message, patches = message_and_patches(document.text)
        train_patches = [patch for patch in patches if not shows_held_out(patch, document, files)]
        if patches:
            side = train if train_patches else test
        is_cut = 0 < len(train_patches) < len(patches)
        text = (
            "".join([message, *(patch.text for patch in train_patches)])
            if is_cut
            else document.text
        )
        side.append(replace(document, text=text))
    return train, test


def shows_held_out(patch: Patch, commit: Document, files: FileSides) -> bool:
    """Return whether the changes of a file in a commit show text of a held-out file."""
    repository = commit.name.rsplit("@", 1)[0]
    paths = (path for path in (patch.before, patch.after) if path != NOWHERE)
    return any(files.is_held_out(f"{repository}/{path}") for path in paths)
