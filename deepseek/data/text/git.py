"""Read a git history as documents: files at a commit, and commits as message and diff."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePosixPath

import pygit2
from pygit2.enums import FileMode, SortMode

from deepseek.checkpoint.files import existing_path
from deepseek.data.text.document import Document, document_name, not_empty
from deepseek.data.text.filters import Skipped, describe, file_document, largest_size, reason_in_git
from deepseek.data.text.git_diffs import (
    Repository,
    commit_documents,
    commit_name,
    is_shallow_boundary,
)
from deepseek.data.text.git_stores import common_folder, refuse_endless
from deepseek.errors import DataError, shown

UNSUPPORTED_FORMATS = ("unsupported extension", "unknown object format")
"""Parts of libgit2's errors about formats that it does not read, such as SHA-256."""


@contextmanager
def damage_explained(path: str | Path) -> Iterator[None]:
    """Raise a `DataError` that names the repository if git cannot read it within the block.

    A damaged or missing object is refused, not skipped, as it is unknown what else is missing.
    """
    try:
        yield
    except DataError:
        raise
    except (pygit2.GitError, KeyError, LookupError, OSError, ValueError, OverflowError) as error:
        if any(word in str(error) for word in UNSUPPORTED_FORMATS):
            raise DataError(
                f"The git repository at {path} has a format that is not supported ({error}); read "
                "its checked-out files as a folder, or make a full clone with SHA-1 and loose "
                "references."
            ) from error
        if "not owned by" in str(error):
            raise DataError(
                f"The git repository at {path} belongs to another user; trust it with "
                f"`git config --global --add safe.directory {Path(path).resolve()}`."
            ) from error
        if _is_partial(path):
            raise DataError(
                f"The git repository at {path} is a partial clone that lacks objects ({error}); "
                "clone it again without `--filter`."
            ) from error
        raise DataError(
            f"The git repository at {path} is damaged or incomplete ({error}); run `git fsck` in "
            "it, or clone it again."
        ) from error


def _is_partial(path: str | Path) -> bool:
    """Return whether the repository at `path` is a partial clone: a remote is its promisor."""
    try:
        config = pygit2.Repository(pygit2.discover_repository(str(path))).config
        return any(
            entry.name.startswith("remote.") and entry.name.endswith(".promisor")
            for entry in config
        )
    except (pygit2.GitError, TypeError, ValueError):  # too damaged to tell
        return False


def open_repository(path: str | Path) -> Repository:
    """Return the repository at `path`, or the folder of a repository that `path` is.

    Raises:
        DataError: there is none, or git cannot open it; or `path` is a file.
    """
    place = existing_path(path)
    if place.is_file():
        raise DataError(f"{path} is a file; give the repository, or a folder in it.")
    with damage_explained(path):
        git_folder = pygit2.discover_repository(str(place))
        if git_folder is None:
            raise DataError(
                f"{path} is not inside a git repository; give a clone, or read it as a folder."
            )
        refuse_endless(Path(git_folder))
        # Not by the git folder, whose parent need not be the work tree.
        repository = Repository(str(place))
        repository.folder = _folder_below_root(place, repository)
        return repository


def _folder_below_root(place: Path, repository: Repository) -> str:
    """Return the path of a folder below the root of its repository; "" if it is the root, or within
    the git folder.
    """
    folder = place.resolve()
    if repository.is_bare or folder.is_relative_to(Path(repository.path).resolve()):
        return ""
    below = folder.relative_to(Path(repository.workdir).resolve())
    return "" if below == Path() else below.as_posix()


def repository_name(repository: Repository) -> str:
    """Return the repository's name: from its origin, so that all clones agree, else its folder,
    which is the main one for all work trees; with the path of the folder that is read, if it is not
    all of it.
    """
    name = _name_of_all(repository)
    return document_name(f"{name}/{repository.folder}") if repository.folder else name


def _name_of_all(repository: Repository) -> str:
    for remote in repository.remotes:
        if remote.name == "origin" and remote.url:
            url = PurePosixPath(remote.url.replace("\\", "/").rstrip("/"))
            # `git@host:shop.git` has no slash.
            if name := url.name.rpartition(":")[2].removesuffix(".git"):
                return document_name(name)
    folder = Path(repository.workdir or repository.path).resolve()
    if (shared := common_folder(Path(repository.path))) is not None:
        folder = shared.parent if shared.name == ".git" else shared
    return document_name(folder.name.removesuffix(".git"))


def file_name(name: str, path: str) -> str:
    """Return the name of a file's document in the repository `name`."""
    return document_name(f"{name}/{path}")


def find_commit(repository: Repository, revision: str) -> pygit2.Commit:
    """Return the commit of a revision (branch, tag, `HEAD~3`, id).

    Raises:
        DataError: there is none that can be read, or it lacks the folder that is read.
    """
    with damage_explained(repository.path):
        branches = ", ".join(sorted(repository.branches))
        if repository.is_empty or (repository.head_is_unborn and not branches):
            raise DataError(f"{repository.path} has no commits; commit something first.")
        if repository.head_is_unborn and revision.startswith("HEAD"):
            raise DataError(f"{repository.path} has no commits at HEAD; check out {branches}.")
    try:
        commit = repository.revparse_single(revision).peel(pygit2.Commit)
        has_folder = repository.tree_of(commit) is not None
    except (KeyError, ValueError, pygit2.GitError) as error:
        raise DataError(
            f"{repository.path} has no commit {shown(revision)} that can be read ({error}); "
            "name a branch, tag or commit id, or run `git fsck`."
        ) from None
    if not has_folder and repository.is_submodule_of(commit):
        raise DataError(
            f"{repository.workdir}{repository.folder} is a submodule that is not checked out; run "
            "`git submodule update --init` first."
        )
    if not has_folder:
        raise DataError(
            f"{repository.workdir}{repository.folder} has no files at {shown(revision)}; commit "
            "them, or read them as a folder."
        )
    return commit


def read_git(
    path: str | Path,
    revision: str = "HEAD",
    *,
    files: bool = True,
    commits: bool = True,
    skipped: Skipped | None = None,
) -> Iterator[Document]:
    """Yield the files at a commit (named `repo/path`), then the commits up to it (named `repo@id`),
    newest first.

    A file's time is that of the commit that added it; 0 if a shallow clone lacks that commit.
    Merges are skipped, since their changes are in the merged commits.

    Args:
        path: the repository, or a folder in it: then only its files are read, and what commits
            changed in it.
        revision: branch, tag or commit id; default: HEAD.
        files: whether to yield files; default: True.
        commits: whether to yield commits; default: True.
        skipped: counter, filled with the number of skipped items by reason; default: not reported.

    Raises:
        DataError: `path` is not a repository, has no commits or lacks the revision (raised at
            once), or has no usable text (raised after reading).
    """
    repository = open_repository(path)
    commit = find_commit(repository, revision)
    counts = skipped if skipped is not None else Skipped()
    with damage_explained(path):
        name = repository_name(repository)
        history, first_seen = walk_history(repository, commit)
    sources = [
        tree_documents(repository, commit, name, first_seen, counts) if files else (),
        commit_documents(repository, history, name, counts) if commits else (),
    ]
    return not_empty(
        explained(chain.from_iterable(sources), path),
        lambda: (
            f"{path} has no usable text at {revision} ({describe(counts)}); "
            "choose another revision or repository."
        ),
    )


def read_git_by_time(
    path: str | Path,
    held_out: float = 0.1,
    revision: str = "HEAD",
    *,
    skipped: Skipped | None = None,
) -> tuple[list[Document], list[Document]]:
    """Return (past, future): the repository before its last commits, and what these commits added.

    The past holds the files at the cut and the commits up to it, so nothing later leaks into it.
    The future holds all other commits and the files that they added, as of `revision`. The cut lies
    on the line of first parents; times, which may be wrong or equal, play no part.

    Args:
        path: the repository, or a folder in it: then only its files are read, and what commits
            changed in it.
        held_out: share of the commits after the cut, in (0, 1); default: 0.1.
        revision: branch, tag or commit id; default: HEAD.
        skipped: counter, filled with the number of skipped items by reason; default: not reported.

    Raises:
        DataError: as for `read_git`, or the history is too short to cut.
    """
    repository = open_repository(path)
    commit = find_commit(repository, revision)
    with damage_explained(path):
        name = repository_name(repository)
        total = count_commits(repository, commit)
        if total < 2 or not 0 < held_out < 1:
            raise DataError(
                f"{path} has {total} commits, of which {held_out} cannot be held out; "
                "split by file."
            )
        cut = find_cut(repository, commit, total - round(total * held_out))
        past_commits, added_times = walk_history(repository, cut)
        paths = chain(added_times, (path for path, _ in tree_files(repository.tree_of(cut))))
        past_names = {commit_name(name, past_commit) for past_commit in past_commits}
        past_names.update(file_name(name, path_at_cut) for path_at_cut in paths)
    past = list(read_git(path, str(cut.id), skipped=skipped))
    future = [document for document in read_git(path, revision) if document.name not in past_names]
    return past, list(
        not_empty(
            future, lambda: f"{path} has no text after {str(cut.id)[:12]}; hold out a larger share."
        )
    )


def count_commits(repository: Repository, commit: pygit2.Commit) -> int:
    """Return the number of commits up to `commit` that concern what is read."""
    return sum(map(repository.concerns, repository.walk(commit.id)))


def find_cut(repository: Repository, commit: pygit2.Commit, past: int) -> pygit2.Commit:
    """Return an ancestor on the first-parent line of `commit` up to which there are about `past`
    commits.

    A commit on a side branch cannot be the cut: the main line of its time is not reachable from it.

    Args:
        repository: the repository.
        commit: the newest commit; it has a parent.
        past: number of commits up to the cut.
    """
    line = []
    while commit.parents:
        commit = commit.parents[0]
        line.append(commit)

    def num_missing(cut: pygit2.Commit) -> int:
        return past - count_commits(repository, cut)

    place = bisect_left(line, 0, hi=len(line) - 1, key=num_missing)
    return min(line[place], line[max(0, place - 1)], key=lambda cut: abs(num_missing(cut)))


def explained(documents: Iterable[Document], path: str | Path) -> Iterator[Document]:
    """Yield documents that are read from a repository; see `damage_explained`."""
    with damage_explained(path):
        yield from documents


def walk_history(
    repository: Repository, commit: pygit2.Commit
) -> tuple[list[pygit2.Commit], dict[str, int]]:
    """Return the commits up to `commit` that concern what is read, newest first, and for each path
    the time at which it was first added, in seconds since 1970.
    """
    commits: list[pygit2.Commit] = []
    first_seen: dict[str, int] = {}
    for ancestor in repository.walk(commit.id, SortMode.TOPOLOGICAL | SortMode.TIME):
        if not repository.concerns(ancestor):
            continue
        commits.append(ancestor)
        if is_shallow_boundary(ancestor):  # when its files were added is unknown
            continue
        for delta in repository.diff_to_parent(ancestor).deltas:
            if delta.status_char() == "A":
                # Older commits come later in the walk and overwrite newer ones.
                first_seen[delta.new_file.path] = ancestor.commit_time
    return commits, first_seen


def tree_documents(
    repository: Repository,
    commit: pygit2.Commit,
    name: str,
    first_seen: dict[str, int],
    skipped: Skipped,
) -> Iterator[Document]:
    """Yield the text files at `commit`, sorted by path; count skipped ones in `skipped`.

    Args:
        repository: the repository.
        commit: the commit whose tree is read.
        name: name of the repository, the first part of all document names.
        first_seen: path -> time at which it was added, in seconds since 1970; default: 0.
        skipped: counter by reason.
    """
    for path, blob in tree_files(repository.tree_of(commit)):
        reason = reason_in_git(path)
        if reason is None and repository.odb.read_header(blob)[1] > largest_size(path):
            reason = "too large"
        if reason:
            skipped[reason] += 1
            continue
        data = repository[blob].peel(pygit2.Blob).data
        time = first_seen.get(path, 0)
        document = file_document(data, path, file_name(name, path), time, skipped)
        if document:
            yield document


def tree_files(tree: pygit2.Tree | None) -> Iterator[tuple[str, pygit2.Oid]]:
    """Yield path and blob id of all regular files below `tree`, without links and submodules; of
    None nothing.
    """
    if tree is None:
        return
    index = pygit2.Index()
    index.read_tree(tree)
    for entry in index:
        if entry.mode in (FileMode.BLOB, FileMode.BLOB_EXECUTABLE):
            yield entry.path, entry.id
