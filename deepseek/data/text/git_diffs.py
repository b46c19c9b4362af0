"""Read commits as documents: message and diff."""

import re
from collections.abc import Iterable, Iterator, Sequence

import pygit2
from pygit2.enums import DiffFind, DiffOption, FileMode

from deepseek.data.text.document import Document, document_name
from deepseek.data.text.filters import (
    MAX_FILE_BYTES,
    Skipped,
    decode,
    kind_of,
    reason_by_content,
    reason_in_git,
    with_line_feeds,
)
from deepseek.data.text.patches import NOWHERE

MAX_COMMIT_CHARACTERS = 32_000
"""Maximum characters of a commit's diff. Larger ones are imports, renames and reformattings, which
teach nothing.
"""

MOST_MOVED = 100_000
"""Maximum files of one commit to look for under other names with the same content."""

MESSAGE_ENCODINGS = ("iso-8859-1", "iso-8859-15", "latin1", "windows-1252")
"""Encodings of messages, beside UTF-8, as git writes their names into commits."""

HEADING = re.compile(rb"[A-Za-z_$]")
"""Beginning of a line that can be the heading of the changes below it, as git has it by default."""

HEADING_BYTES = 80
"""Maximum bytes of a heading, as libgit2 has it."""

BLOB_MODES = (FileMode.BLOB, FileMode.BLOB_EXECUTABLE, FileMode.LINK)


def commit_name(name: str, commit: pygit2.Commit) -> str:
    """Return the name of a commit's document in the repository `name`."""
    return f"{name}@{str(commit.id)[:12]}"


def is_shallow_boundary(commit: pygit2.Commit) -> bool:
    """Return whether a shallow clone ends at a commit: it has parents, but not in the clone.

    libgit2 shows it as a commit without parents, which would have added every file.
    """
    return not commit.parents and b"\nparent " in commit.read_raw().partition(b"\n\n")[0]


class Repository(pygit2.Repository):
    """A git repository, or a folder of it that is read as if it were one.

    Attributes:
        folder: path of the folder below the repository's root, with slashes; "": all of it.
    """

    folder = ""

    def tree_of(self, commit: pygit2.Commit) -> pygit2.Tree | None:
        """Return the tree of the folder at a commit; None if the commit has no such folder."""
        if not self.folder:
            return commit.tree
        try:
            found = commit.tree[self.folder]
        except KeyError:
            return None
        return found if isinstance(found, pygit2.Tree) else None

    def is_submodule_of(self, commit: pygit2.Commit) -> bool:
        """Return whether the folder is a submodule at a commit."""
        try:
            return bool(self.folder) and commit.tree[self.folder].filemode == FileMode.COMMIT
        except KeyError:
            return False

    def changes(self, before: pygit2.Commit | None, after: pygit2.Commit) -> pygit2.Diff:
        """Return what changed in the folder between two commits, with paths below the folder.

        Args:
            before: the earlier commit; None: there is none, so that everything was added.
            after: the later commit.
        """
        flags = DiffOption.IGNORE_SUBMODULES
        former_tree = before and self.tree_of(before)
        later_tree = self.tree_of(after)
        if former_tree is not None and later_tree is not None:
            return former_tree.diff_to_tree(later_tree, flags=flags)
        if later_tree is not None:
            return later_tree.diff_to_tree(swap=True, flags=flags)
        if former_tree is not None:
            return former_tree.diff_to_tree(flags=flags)
        return after.tree.diff_to_tree(after.tree)

    def diff_to_parent(self, commit: pygit2.Commit) -> pygit2.Diff:
        """Return what a commit changed in the folder since its first parent, if it has one."""
        return self.changes(commit.parents[0] if commit.parents else None, commit)

    def concerns(self, commit: pygit2.Commit) -> bool:
        """Return whether a commit changed the folder; of all the repository, every commit does.

        Trees are compared by their ids, without a diff, since a history is walked several times to
        find where to cut it.
        """
        if not self.folder:
            return True
        tree = self.tree_of(commit)
        former_tree = self.tree_of(commit.parents[0]) if commit.parents else None
        if tree is None or former_tree is None:
            return tree is not former_tree
        return bool(tree.id != former_tree.id)


def find_exact_renames(diff: pygit2.Diff) -> None:
    """Merge each pair of a deleted and an added file with the same content into a rename.

    The flags are explicit, so that the user's git settings have no effect.
    """
    flags = DiffFind.FIND_RENAMES | DiffFind.FIND_EXACT_MATCH_ONLY
    diff.find_similar(flags=flags, rename_limit=MOST_MOVED)


def commit_documents(
    repository: Repository, commits: Iterable[pygit2.Commit], name: str, skipped: Skipped
) -> Iterator[Document]:
    """Yield message and diff of each commit with usable changes.

    Args:
        repository: the repository.
        commits: its commits.
        name: name of the repository, the first part of all document names.
        skipped: counter by reason.
    """
    for commit in commits:
        document = commit_document(repository, commit, name, skipped)
        if document:
            yield document


def commit_document(
    repository: Repository, commit: pygit2.Commit, name: str, skipped: Skipped
) -> Document | None:
    """Return message and diff of a commit, or None after counting why it is skipped.

    Args:
        repository: the repository.
        commit: the commit.
        name: name of the repository.
        skipped: counter by reason.
    """
    if is_shallow_boundary(commit) or len(commit.parents) > 1:
        skipped["merge" if commit.parents else "shallow boundary"] += 1
        return None
    changes = diff_text(repository, repository.diff_to_parent(commit))
    if changes is None:
        skipped["large commit"] += 1
        return None
    if not changes:
        skipped["commit without text"] += 1
        return None
    text = f"{message_of(commit)}\n\n{changes}"
    return Document(text, commit_name(name, commit), "commit", commit.commit_time)


def message_of(commit: pygit2.Commit) -> str:
    """Return the message of a commit, with `\\n` line ends: what is written into the form of a web
    page, as for a squashed pull request, has those of Windows.

    Not `commit.message`, which uses any encoding that the commit names.
    """
    encoding = (commit.message_encoding or "").lower()
    if encoding not in MESSAGE_ENCODINGS:
        encoding = "utf-8"
    return with_line_feeds(commit.raw_message.decode(encoding, "replace")).strip()


def diff_text(repository: Repository, diff: pygit2.Diff) -> str | None:
    """Return a diff without line numbers, modes and blob ids, None if it is too long.

    The format does not depend on the user's git settings, apart from files that git's attributes
    leave out of diffs. Two kinds of files are left out before their lines are compared: those that
    are not read as documents, by name, size or content, and those that were only renamed, which
    would show the whole text twice. So are submodules, of which a diff has only the commit.
    """
    find_exact_renames(diff)
    parts: list[str] = []
    remaining_characters = MAX_COMMIT_CHARACTERS
    for index, delta in enumerate(diff.deltas):
        if reason_in_git(delta.new_file.path) or is_left_out(repository, delta):
            continue
        part = patch_text(repository, diff[index], remaining_characters)
        if part is None:
            return None
        parts.append(part)
        remaining_characters -= len(part)
    return "".join(parts)


def is_left_out(repository: Repository, delta: pygit2.DiffDelta) -> bool:
    """Return whether a changed file, before or after, is too large to be read, is generated, holds
    data or is a submodule.
    """
    for file in (delta.old_file, delta.new_file):
        if file.mode == FileMode.COMMIT:  # libgit2 leaves out only a submodule that changes
            return True
        if file.mode not in BLOB_MODES:
            continue
        if repository.odb.read_header(file.id)[1] > MAX_FILE_BYTES:
            return True
        text = decode(repository[file.id].read_raw()) if file.mode != FileMode.LINK else None
        if text and text.strip() and reason_by_content(text, kind_of(file.path)):
            return True
    return False


def patch_text(repository: Repository, patch: pygit2.Patch | None, limit: int) -> str | None:
    """Return the changes of one file, "" if they are not UTF-8 text, None if they are too long.

    Args:
        repository: the repository.
        patch: the changes; None: only the file mode has changed.
        limit: maximum characters.
    """
    if patch is None or patch.delta.is_binary:
        return ""
    if 2 * sum(patch.line_stats) > limit:  # each line has a sign and an end, at least
        return None
    hunks = patch.hunks
    if not hunks:
        return ""
    delta = patch.delta
    status = delta.status_char()
    old_path = NOWHERE if status == "A" else document_name(delta.old_file.path)
    new_path = NOWHERE if status == "D" else document_name(delta.new_file.path)
    old_lines = [] if status == "A" else repository[delta.old_file.id].read_raw().split(b"\n")
    lines = [f"--- {old_path}\n+++ {new_path}\n"]
    for hunk in hunks:
        lines.append(f"@@ {heading_above(old_lines, hunk.old_start - 1)}".rstrip() + "\n")
        try:
            lines += [line_text(line) for line in hunk.lines if line.origin in "+- "]
        except UnicodeDecodeError:
            return ""
    text = "".join(lines)
    return text if len(text) <= limit else None


def heading_above(lines: Sequence[bytes], count: int) -> str:
    """Return the heading of changes: the nearest line above without indentation; "" if there is none.

    Not the one of `git diff`, which depends on the attributes of the user's files.

    Args:
        lines: lines of the old file.
        count: number of lines above the changes.
    """
    for line in reversed(lines[: max(0, count)]):
        if HEADING.match(line):
            return line.rstrip()[:HEADING_BYTES].decode("utf-8", "replace").strip()
    return ""


def line_text(line: pygit2.DiffLine) -> str:
    """Return a line with its sign.

    Raises:
        UnicodeDecodeError: it is not UTF-8; `line.content` would hold U+FFFD.
    """
    return f"{line.origin}{line.raw_content.decode('utf-8').rstrip()}\n"
