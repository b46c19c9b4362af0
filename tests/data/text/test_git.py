"""Git histories: files, commits, times, exclusions, and splits by time without leaks."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pygit2
import pytest
from git_history import History
from hypothesis import given, settings
from hypothesis import strategies as st
from pygit2.enums import FileMode, ObjectType, ResetMode

from deepseek.data import read_git, read_git_by_time
from deepseek.data.builders.questions import all_questions
from deepseek.data.text.commits import renamed_files
from deepseek.data.text.document import Document
from deepseek.data.text.filters import Skipped
from deepseek.data.text.git import damage_explained, find_commit, open_repository, repository_name
from deepseek.data.text.patches import message_and_patches
from deepseek.errors import DataError

Commit = Callable[..., str]


def by_name(documents: list[Document]) -> dict[str, Document]:
    return {document.name: document for document in documents}


def test_files_at_a_commit_with_the_time_they_were_added(repository: Path, commit: Commit) -> None:
    first = commit({"a.py": "a = 1\n", "docs/b.md": "prose\n"}, "one", 100)
    commit({"a.py": "a = 2\n", "c.py": "c = 1\n"}, "two", 200)
    head = by_name(list(read_git(repository, commits=False)))
    assert {n: (d.text, d.kind, d.time) for n, d in head.items()} == {
        "engine/a.py": ("a = 2\n", "code", 100),
        "engine/c.py": ("c = 1\n", "code", 200),
        "engine/docs/b.md": ("prose\n", "text", 100),
    }
    assert (
        by_name(list(read_git(repository, first, commits=False)))["engine/a.py"].text == "a = 1\n"
    )


def test_a_file_added_again_has_its_first_time(repository: Path, commit: Commit) -> None:
    commit({"a.py": "a = 1\n", "b.py": "b = 1\n"}, "one", 100)
    commit({"a.py": None}, "two", 200)
    commit({"a.py": "a = 3\n"}, "three", 300)
    assert by_name(list(read_git(repository, commits=False)))["engine/a.py"].time == 100


def test_commits_are_message_and_diff_newest_first(repository: Path, commit: Commit) -> None:
    commit({"a.py": "def f():\n    return 1\n"}, "Add f\n\nIt returns one.\n", 100)
    second = commit({"a.py": "def f():\n    return 2\n"}, "Return two", 200)
    newest, oldest = read_git(repository, files=False)
    assert newest == Document(
        "Return two\n\n--- a.py\n+++ a.py\n@@\n def f():\n-    return 1\n+    return 2\n",
        f"engine@{second[:12]}",
        "commit",
        200,
    )
    assert oldest.text.startswith(
        "Add f\n\nIt returns one.\n\n--- /dev/null\n+++ a.py\n@@\n+def f():\n"
    )


def test_a_message_from_the_form_of_a_web_page_has_paragraphs(
    repository: Path, commit: Commit
) -> None:
    """Those of squashed pull requests have the line ends of Windows."""
    paragraph = "The reader lost the last line of a file, as it has no end."
    commit({"a.py": "a = 1\n"}, f"Fix it (#12)\r\n\r\n{paragraph}\r\n\r\n* add a test\r\n", 100)
    (document,) = read_git(repository, files=False)
    assert document.text.startswith(
        f"Fix it (#12)\n\n{paragraph}\n\n* add a test\n\n--- /dev/null\n"
    )
    (question,) = all_questions([document])
    assert question.answer == paragraph


@pytest.mark.parametrize("encoding", ["ISO-8859-1", "windows-1252", "utf-8", "idna"])
def test_a_message_is_read_in_its_encoding(repository: Path, commit: Commit, encoding: str) -> None:
    made = commit({"a.py": "a = 1\n"}, "one", 100)
    history = pygit2.Repository(str(repository))
    raw = history[made].read_raw().partition(b"\n\n")[0]
    said = "Größe geändert".encode("utf-8" if encoding == "idna" else encoding)
    other = history.write(
        ObjectType.COMMIT, raw + f"\nencoding {encoding}\n\n".encode() + said + b"\n"
    )
    (document,) = [d for d in read_git(repository, str(other)) if d.kind == "commit"]
    assert document.text.startswith("Größe geändert\n\n")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://example.org/shop.git", "shop"),
        ("git@example.org:shop.git", "shop"),
        ("git@example.org:team/shop", "shop"),
        ("https://example.org/.git", "folder"),
    ],
)
def test_a_repository_has_the_name_of_its_origin(url: str, name: str, tmp_path: Path) -> None:
    repository = pygit2.init_repository(tmp_path / "folder")
    repository.remotes.create("origin", url)
    assert repository_name(open_repository(tmp_path / "folder")) == name


@pytest.mark.parametrize("folder", [".", "docs"])
@pytest.mark.parametrize("bare", [False, True])
def test_all_work_trees_have_the_name_of_the_main_one(
    bare: bool, folder: str, repository: Path, commit: Commit, tmp_path: Path
) -> None:
    commit({"docs/a.md": "# Ships\n"}, "Add ships", 1_700_000_000)
    main = tmp_path / ("shop.git" if bare else "shop")
    pygit2.clone_repository(str(repository), str(main), bare=bare).remotes.delete("origin")
    pygit2.Repository(main).add_worktree("linked", tmp_path / "linked")
    name = "shop" if folder == "." else "shop/docs"
    assert repository_name(open_repository(tmp_path / "linked" / folder)) == name
    if not bare:
        assert repository_name(open_repository(main / folder)) == name


def test_the_form_of_a_diff_does_not_depend_on_git_settings(
    repository: Path, commit: Commit
) -> None:
    body = "".join(f"        x = {number}\n" for number in range(9))
    text = f"class A:\n    def two(self):\n{body}"
    commit({"a.py": text}, "one", 100)
    commit({"a.py": f"{text}        return x\n"}, "two", 200)
    before = list(read_git(repository))
    assert "\n@@ class A:\n" in next(d.text for d in before if d.kind == "commit")
    # Another rule for the headings.
    (repository / ".git" / "info").mkdir(exist_ok=True)
    (repository / ".git" / "info" / "attributes").write_text("*.py diff=python\n")
    config = pygit2.Repository(repository).config
    config["diff.noprefix"], config["diff.mnemonicPrefix"], config["diff.context"] = True, True, 0
    assert list(read_git(repository)) == before


def test_what_is_no_text_to_learn_from_is_counted(repository: Path, commit: Commit) -> None:
    files: dict[str, str | bytes | None] = {
        "good.py": "x = 1\n",
        "image.png": b"\x89PNG\0",
        "blob": b"abc\0def",
        "latin.txt": "größe".encode("latin-1"),
        ".env": "PASSWORD=hunter2\n",
        "package-lock.json": "{}",
        "vendor/lib.js": "var x\n",
        "gen.py": "# Code generated by protoc. DO NOT EDIT.\nx = 1\n",
        "bundle.js": "x" * 5000,
        "model.psd": "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n",
        "big.py": "x\n" * 600_000,
        "empty.py": "\n",
    }
    commit(files, "all", 100)
    skipped = Skipped()
    assert [d.name for d in read_git(repository, commits=False, skipped=skipped)] == [
        "engine/good.py"
    ]
    (document,) = read_git(repository, files=False)
    assert [patch.path for patch in message_and_patches(document.text)[1]] == [
        "empty.py",
        "good.py",
    ]
    assert skipped == {
        "binary or data": 3,
        "not UTF-8": 1,
        "credentials": 1,
        "generated": 2,
        "vendored or built": 1,
        "minified or data": 1,
        "too large": 1,
        "empty": 1,
    }


def test_merges_binary_changes_and_huge_commits_are_left_out(
    repository: Path, commit: Commit
) -> None:
    base = commit({"a.py": "a = 1\n"}, "base", 100)
    commit({"blob.bin": b"\0\1"}, "binary only", 200)
    commit({"long.py": "".join(f"x{i} = {i}\n" for i in range(9000))}, "import", 300)
    commit({"b.py": "b = 1\n"}, "merge", 400, parents=[base])
    skipped = Skipped()
    texts = [d.text.split("\n")[0] for d in read_git(repository, files=False, skipped=skipped)]
    assert texts == ["base"]
    assert skipped == {"commit without text": 1, "large commit": 1, "merge": 1}


def test_a_commit_that_only_renames_shows_no_text(repository: Path, commit: Commit) -> None:
    body = "".join(f"line_{number} = {number}\n" for number in range(20))
    commit({"a.py": body, "b.py": body + "more = 1\n"}, "one", 100)
    commit({"a.py": None, "c.py": body}, "rename", 200)
    skipped = Skipped()
    texts = [d.text.split("\n")[0] for d in read_git(repository, files=False, skipped=skipped)]
    assert texts == ["one"] and skipped == {"commit without text": 1}


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("unknown object format 'sha256'", "format that is not supported"),
        ("unsupported extension name extensions.refstorage", "format that is not supported"),
        ("object not found", "damaged or incomplete"),
        ("repository path 'shop' is not owned by current user", r"git config .* safe\.directory"),
    ],
)
def test_what_libgit2_does_not_read_is_not_called_damaged(error: str, cause: str) -> None:
    with pytest.raises(DataError, match=cause), damage_explained("shop"):
        raise pygit2.GitError(error)


def test_changes_that_are_not_utf_8_or_hold_passwords_are_no_text(
    repository: Path, commit: Commit
) -> None:
    body = "größe = 1\n" + "x = 1\n" * 20
    commit({"a.py": body.encode("latin-1"), "ok.py": body, ".env": "PASSWORD=hunter2\n"}, "1", 100)
    commit({"a.py": body.encode("latin-1") + b"y = 2\n"}, "2", 200)
    newest, oldest = read_git(repository, files=False)
    assert newest.text == "2\n\n--- a.py\n+++ a.py\n@@ x = 1\n x = 1\n x = 1\n x = 1\n+y = 2\n"
    assert oldest.text.startswith("1\n\n--- /dev/null\n+++ ok.py\n@@\n+größe = 1\n")
    assert "\ufffd" not in oldest.text and "hunter2" not in oldest.text


def test_changes_of_large_files_are_left_out_before_they_are_compared(
    repository: Path, commit: Commit
) -> None:
    rows = "".join(f'"{number}",\n' for number in range(800_000))
    commit({"table.txt": rows, "a.py": "a = 1\n"}, "add", 100)
    commit({"short.txt": "0\n" * 500_000, "a.py": "a = 2\n"}, "many lines", 200)
    commit({"table.txt": None, "a.py": "a = 3\n"}, "remove", 300)
    tracemalloc.start()
    try:
        skipped = Skipped()
        texts = [document.text for document in read_git(repository, files=False, skipped=skipped)]
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert texts == [
        "remove\n\n--- a.py\n+++ a.py\n@@\n-a = 2\n+a = 3\n",
        "add\n\n--- /dev/null\n+++ a.py\n@@\n+a = 1\n",
    ]
    assert skipped == {"large commit": 1}


def test_large_files_are_not_loaded(
    repository: Path, commit: Commit, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit({"large.py": "x\n" * 600_000, "a.py": "a = 1\n"}, "one", 100)
    commit({"b.py": "b = 1\n"}, "two", 200)
    load = pygit2.Repository.__getitem__
    sizes = []

    def recorded(opened: pygit2.Repository, identity: pygit2.Oid) -> pygit2.Object:
        found = load(opened, identity)
        sizes.append(len(found.read_raw()))
        return found

    monkeypatch.setattr(pygit2.Repository, "__getitem__", recorded)
    skipped = Skipped()
    assert len(list(read_git(repository, commits=False, skipped=skipped))) == 2
    assert max(sizes) < 1000 and skipped == {"too large": 1}
    assert read_git_by_time(repository, 0.5)[1]


def make_shallow(repository: Path, *boundary: str) -> None:
    """Cut the history at the commits `boundary`, as `git clone --depth` does."""
    (repository / ".git" / "shallow").write_text("".join(f"{commit}\n" for commit in boundary))


def test_a_shallow_clone_adds_no_files_where_it_ends(repository: Path, commit: Commit) -> None:
    commit({"a.py": "a = 1\n"}, "one", 100)
    boundary = commit({"b.py": "b = 1\n"}, "two", 200)
    commit({"a.py": "a = 3\n", "c.py": "c = 1\n"}, "three", 300)
    complete = by_name(list(read_git(repository)))
    make_shallow(repository, boundary)
    skipped = Skipped()
    shallow = by_name(list(read_git(repository, skipped=skipped)))
    assert skipped == {"shallow boundary": 1}
    assert {n: d.time for n, d in shallow.items() if d.kind == "code"} == {
        "engine/a.py": 0,
        "engine/b.py": 0,
        "engine/c.py": 300,
    }
    assert [d for d in shallow.values() if d.kind == "commit"] == [
        d for d in complete.values() if d.kind == "commit" and d.time == 300
    ]
    past, future = read_git_by_time(repository, 0.5)
    assert [document.name for document in past] == ["engine/a.py", "engine/b.py"]
    assert [document.time for document in future] == [300, 300]


def test_a_partial_clone_is_told_from_a_damaged_one(repository: Path, commit: Commit) -> None:
    first = commit({"a.py": "print(1)\n" * 20}, "one", 100)
    commit({"a.py": "print(2)\n" * 20}, "two", 200)
    opened = pygit2.Repository(repository)
    blob = str(opened[first].tree["a.py"].id)
    (repository / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(DataError, match="damaged or incomplete"):
        list(read_git(repository))
    # As set by `git clone --filter=blob:none`.
    opened.config["remote.origin.promisor"] = True
    with pytest.raises(DataError, match=r"partial clone .* clone it again without `--filter`"):
        list(read_git(repository))


def test_a_first_commit_is_no_shallow_boundary(repository: Path, commit: Commit) -> None:
    first = commit({"a.py": "a = 1\n"}, "one\n\nparent of all", 100)
    make_shallow(repository, first)
    assert [document.time for document in read_git(repository)] == [100, 100]


def test_links_are_not_followed(repository: Path, commit: Commit) -> None:
    (repository / "real.py").write_text("x = 1\n")
    (repository / "link.py").symlink_to("/etc/passwd")
    repo = pygit2.Repository(repository)
    repo.index.add("link.py")
    repo.index.write()
    commit({"real.py": "x = 1\n"}, "one", 100)
    assert [d.name for d in read_git(repository, commits=False)] == ["engine/real.py"]


def test_the_past_knows_nothing_of_the_future(repository: Path, commit: Commit) -> None:
    for number in range(8):
        commit({"old.py": f"version = {number}\n"}, f"old {number}", 100 + number)
    commit({"back.py": "away = 1\n"}, "add back", 110)
    commit({"back.py": None}, "remove back", 111)
    commit({"old.py": "version = 'future'\n", "back.py": "away = 1\n"}, "change", 200)
    commit({"new.py": "future = True\n"}, "add", 300)
    past, future = read_git_by_time(repository, held_out=0.17)
    assert "future" not in "".join(document.text for document in past)
    assert by_name(past)["engine/old.py"].text == "version = 7\n"
    assert len([d for d in past if d.kind == "commit"]) == 10
    # A file known in the past is not new when it is added again.
    assert {d.text.split("\n")[0] for d in future} == {"future = True", "change", "add"}


def cut_by_position(repository: Path, held_out: float) -> tuple[list[Document], list[Document]]:
    """The split of a linear history with increasing times, computed from its definition."""
    commits = list(pygit2.Repository(repository).walk(pygit2.Repository(repository).head.target))
    cut = commits[min(len(commits) - 1, max(1, round(len(commits) * held_out)))]
    past = list(read_git(repository, str(cut.id)))
    known = {document.name for document in past}
    later = [document for document in read_git(repository) if document.time > cut.commit_time]
    return past, [document for document in later if document.name not in known]


@pytest.mark.parametrize("held_out", [0.01, 0.1, 0.25, 0.5, 0.99])
def test_a_linear_history_is_cut_at_the_share(
    repository: Path, commit: Commit, held_out: float
) -> None:
    for number in range(11):
        commit({f"m{number}.py": f"m = {number}\n", "a.py": f"{number}\n"}, "more", 100 + number)
    assert read_git_by_time(repository, held_out) == cut_by_position(repository, held_out)


@pytest.mark.parametrize("time", [lambda _: 100, lambda number: 900 - number])
def test_times_play_no_part_in_the_cut(
    repository: Path, commit: Commit, time: Callable[[int], int]
) -> None:
    for number in range(10):
        commit({f"m{number}.py": f"m = {number}\n"}, f"m{number}", time(number))
    past, future = read_git_by_time(repository, 0.3)
    assert len(past) == 2 * 7
    assert {d.text.split("\n")[0] for d in future if d.kind == "commit"} == {"m7", "m8", "m9"}
    assert {d.name for d in future if d.kind == "code"} == {f"engine/m{n}.py" for n in (7, 8, 9)}


HISTORIES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=4, max_size=12)


@given(HISTORIES, st.lists(st.integers(0, 9), min_size=13, max_size=13), st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_every_document_is_past_or_future_whatever_was_merged(
    steps: list[tuple[int, int]], times: list[int], held_out: float
) -> None:
    with TemporaryDirectory() as folder:
        repo = pygit2.init_repository(folder)
        builder = repo.TreeBuilder()
        ids: list[pygit2.Oid] = []
        for number, (back, others) in enumerate([(0, 0), *steps]):
            builder.insert(
                f"m{number}.py", repo.create_blob(f"m = {number}\n".encode()), FileMode.BLOB
            )
            who = pygit2.Signature("A", "a@example.org", 100 + times[number], 0)
            parents = list(dict.fromkeys([*ids[-1 - back :][:1], *ids[-1 - others :]]))
            ids.append(repo.create_commit(None, who, who, "m", builder.write(), parents))
        repo.set_head(repo.create_branch("tip", repo[ids[-1]].peel(pygit2.Commit)).name)
        past, future = read_git_by_time(folder, held_out)
        names = [document.name for document in [*past, *future]]
        assert sorted(names) == sorted({document.name for document in read_git(folder)})


def test_a_branch_that_is_merged_late_is_no_cut(repository: Path, commit: Commit) -> None:
    base = commit({"m0.py": "m = 0\n"}, "m0", 100)
    repo = pygit2.Repository(repository)
    main = base
    for number in range(1, 17):
        main = commit({f"m{number}.py": f"m = {number}\n"}, f"m{number}", 100 + number)
    for number in range(1, 17):
        repo.index.read()
        repo.index.remove(f"m{number}.py")
        repo.index.write()
    repo.reset(pygit2.Oid(hex=base), ResetMode.SOFT)
    side = commit({"s.py": "s = 1\n"}, "side", 116)
    repo.reset(pygit2.Oid(hex=main), ResetMode.HARD)
    commit({"s.py": "s = 1\n"}, "merge", 200, parents=[side])
    past, future = read_git_by_time(repository, 0.1)
    assert len([d for d in past if d.kind == "commit"]) == 17
    assert {d.name for d in future} == {"engine/s.py", f"engine@{side[:12]}"}


@pytest.mark.parametrize("folder", ["", "src"])
def test_a_work_tree_away_from_its_git_folder_is_read(
    repository: Path, commit: Commit, tmp_path: Path, folder: str
) -> None:
    commit({"src/a.py": "a = 1\n", "b.py": "b = 1\n"}, "one", 100)
    expected = list(read_git(repository / folder))
    (repository / ".git").rename(tmp_path / "apart.git")
    (repository / ".git").write_text(f"gitdir: {tmp_path / 'apart.git'}\n")
    assert list(read_git(repository / folder)) == expected


def test_a_head_without_commits_leaves_the_other_branches(repository: Path, commit: Commit) -> None:
    commit({"router.py": "ROUTES = ['a', 'b', 'c', 'd']\n" * 9}, "first", 100)
    opened = pygit2.Repository(repository)
    branch = opened.head.shorthand
    opened.set_head("refs/heads/other")
    assert [document.name for document in read_git(repository, branch, commits=False)]
    with pytest.raises(DataError, match=f"no commits at HEAD; check out {branch}"):
        read_git(repository)


def test_each_mistake_is_named(tmp_path: Path, repository: Path, commit: Commit) -> None:
    outside = tmp_path / "plain"
    outside.mkdir()
    with pytest.raises(DataError, match="not inside a git repository"):
        read_git(outside)
    with pytest.raises(DataError, match="does not exist"):
        read_git(tmp_path / "missing")
    with pytest.raises(DataError, match="has no commits"):
        read_git(repository)
    commit({"empty.py": ""}, "nothing", 100)
    with pytest.raises(DataError, match="has no commit 'v9'"):
        read_git(repository, "v9")
    with pytest.raises(DataError, match="no usable text"):
        list(read_git(repository))
    with pytest.raises(DataError, match="has 1 commits"):
        read_git_by_time(repository)


TREES = st.lists(
    st.dictionaries(
        st.sampled_from(["sub/a.py", "sub/deep/b.py", "other/a.py", "c.py"]),
        st.integers(0, 3).map(lambda number: f"value = {number}\n"),
        min_size=1,
    ),
    min_size=1,
    max_size=8,
)


@given(TREES)
@settings(max_examples=30, deadline=None)
def test_a_folder_is_read_like_a_repository_that_holds_nothing_else(
    trees: list[dict[str, str]],
) -> None:
    """What `git filter-repo --subdirectory-filter` would leave has the same documents."""
    with TemporaryDirectory() as place:
        whole = History(Path(place, "whole"))
        alone = History(Path(place, "alone"))
        former: dict[str, str] = {}
        for tree in trees:
            below = {
                path.removeprefix("sub/"): text
                for path, text in tree.items()
                if path.startswith("sub/")
            }
            whole.commit(tree)
            alone.time = whole.time - 1
            if below != former:
                alone.commit(below)
            former = below
        folder = whole.path / "sub"
        folder.mkdir(exist_ok=True)
        if not former:
            with pytest.raises(DataError, match="sub has no files at 'HEAD'; commit them"):
                read_git(folder)
            return
        read = [
            (document.text, document.time, document.name.removeprefix("engine/sub").split("@")[0])
            for document in read_git(folder)
        ]
        expected = [
            (document.text, document.time, document.name.removeprefix("engine").split("@")[0])
            for document in read_git(alone.path)
        ]
        assert read == expected


def test_a_folder_is_split_by_the_commits_that_changed_it(tmp_path: Path) -> None:
    history = History(tmp_path / "whole")
    files = {"sub/0.py": "value = 0\n"}
    for number in range(1, 11):
        files[f"sub/{number}.py"] = f"value = {number}\n"
        history.commit(files)
    for number in range(20):
        files["other.py"] = f"other = {number}\n"
        history.commit(files)
    folder = tmp_path / "whole" / "sub"
    folder.mkdir()
    past, future = read_git_by_time(folder, 0.2)
    assert {document.name for document in future if document.kind == "code"} == {
        "engine/sub/9.py",
        "engine/sub/10.py",
    }
    assert [document.kind for document in past].count("commit") == 8
    assert not any("other" in document.text for document in [*past, *future])


def test_renamed_files_of_a_folder_have_their_names_in_it(tmp_path: Path) -> None:
    history = History(tmp_path / "whole")
    text = history.new_lines(20)
    history.commit({"sub/a.py": text, "other.py": "x\n"})
    history.commit({"sub/b.py": text, "other.py": "x\n"})
    folder = tmp_path / "whole" / "sub"
    folder.mkdir()
    repository = open_repository(folder)
    assert list(renamed_files(repository, find_commit(repository, "HEAD"))) == [
        ("engine/sub/a.py", "engine/sub/b.py")
    ]


def test_a_submodule_is_no_text(tmp_path: Path) -> None:
    history = History(tmp_path)
    first = history.commit({"a.py": "a = 1\n"}, message="Add a")
    index = pygit2.Index()
    index.read_tree(history.head.tree)
    index.add(pygit2.IndexEntry("lib", first, FileMode.COMMIT))
    index.add(pygit2.IndexEntry("b.py", history.repository.create_blob(b"b = 2\n"), FileMode.BLOB))
    tree = index.write_tree(history.repository)
    who = pygit2.Signature("A", "a@example.org", 200)
    history.repository.create_commit("refs/heads/main", who, who, "Use lib", tree, [first])
    assert [document.text for document in read_git(tmp_path, files=False)] == [
        "Use lib\n\n--- /dev/null\n+++ b.py\n@@\n+b = 2\n",
        "Add a\n\n--- /dev/null\n+++ a.py\n@@\n+a = 1\n",
    ]
    (tmp_path / "lib").mkdir()
    with pytest.raises(DataError, match="lib is a submodule that is not checked out; run"):
        read_git(tmp_path / "lib")


def test_a_file_is_no_repository(repository: Path, commit: Commit) -> None:
    commit({"a.py": "a = 1\n"}, "one", 100)
    with pytest.raises(DataError, match=r"a\.py is a file; give the repository"):
        read_git(repository / "a.py")
