"""Readers of text: for any file, they yield documents or name the file and line; none hangs."""

import json
import math
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pygit2
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deepseek.data import read_folder, read_git, read_records
from deepseek.data.preferences.files import read_preferences
from deepseek.data.text.git import open_repository
from deepseek.data.text.git_stores import _is_whole
from deepseek.data.text.pages import html_to_text
from deepseek.data.text.source import record_document
from deepseek.errors import DataError
from deepseek.terminal import is_unicode

TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]) | TEXT, "content": TEXT}),
    max_size=3,
)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "text": TEXT | VALUES,
        "messages": MESSAGES | VALUES,
        "prompt": TEXT | MESSAGES | VALUES,
        "chosen": TEXT | MESSAGES | VALUES,
        "rejected": TEXT | MESSAGES | VALUES,
        "time": VALUES,
        "scores": VALUES,
        "labels": VALUES,
        "source": VALUES,
    },
)
ON_FILES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@settings(max_examples=150, deadline=None)
@given(record=RECORDS)
@example(record={"text": "a", "time": math.nan})
@example(record={"text": "a", "time": math.inf})
@example(record={"text": "a", "time": 10**400})
@example(record={"text": "half \ud83d"})
@example(record={"messages": [{"role": "user", "content": "\udc00"}]})
def test_a_record_is_a_document_or_a_named_line(record: dict[str, Any]) -> None:
    try:
        document = record_document(record, "a:b.jsonl:7")
    except DataError as error:
        assert str(error).startswith("a:b.jsonl line 7")
        assert is_unicode(str(error))
        return
    assert is_unicode(document.text) and isinstance(document.time, int)


LINES = st.one_of(
    RECORDS.map(json.dumps).map(str.encode),
    st.binary(max_size=30),
    st.sampled_from(
        [
            b"[" * 100_000,
            b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}",
            b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
            b'{"prompt": ['
            + b"[" * 900
            + b"]" * 900
            + b'], "chosen": ['
            + b"[" * 900
            + b"]" * 901
            + b"}",
            b'{"text": "\\ud800"}',
            b'{"text": "a", "time": NaN}',
            b'{"text": "a", "time": -Infinity}',
            b'{"text": "a", "time": 1e999}',
            b'{"text": "a", "time": ' + b"9" * 5000 + b"}",
            b'{"text": "a\x00b"}',
            b"\xff\xfe",
        ]
    ),
)


@ON_FILES
@given(lines=st.lists(LINES, max_size=4))
def test_jsonl_of_anything_is_read_or_refused(
    lines: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "d.jsonl"
    path.write_bytes(b"\n".join(lines))
    for read in (read_records, read_preferences):
        try:
            list(read(path))
        except DataError as error:
            assert "d.jsonl" in str(error)


ODD_COLUMNS = [
    pa.array([b"\xff"], pa.binary()),
    pa.array([2**62], pa.timestamp("ms")),
    pa.array([1], pa.timestamp("ns", "Nowhere/Zone")),
    pa.array([{"a": [None]}]),
    pa.array(["x"]).dictionary_encode(),
    pa.array([math.nan]),
    pa.array([None], pa.null()),
    pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
    pa.array([10**30], pa.decimal128(38, 0)),
]


@pytest.mark.parametrize("column", ODD_COLUMNS, ids=lambda column: str(column.type))
def test_odd_parquet_columns(column: pa.Array, tmp_path: Path) -> None:
    for names in (["text"], ["messages"], ["time", "text"]):
        arrays = [column, pa.array(["fine"])] if len(names) == 2 else [column]
        pq.write_table(pa.table(dict(zip(names, arrays, strict=True))), tmp_path / "d.parquet")
        try:
            assert all(
                is_unicode(document.text) for document in read_records(tmp_path / "d.parquet")
            )
        except DataError as error:
            assert "d.parquet" in str(error)


@ON_FILES
@given(seed=st.integers(0, 10**6))
def test_damaged_parquet_is_refused(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("parquet") / "d.parquet"
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(200)]}), path)
    draw = random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(draw.randrange(1, 8)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    path.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
    try:
        list(read_records(path))
    except DataError as error:
        assert "d.parquet" in str(error)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of a few commits."""
    folder = tmp_path_factory.mktemp("git") / "repo"
    repository = pygit2.init_repository(folder)
    for number in range(4):
        (folder / f"f{number}.py").write_text(f"value = {number}\n" * 9)
        repository.index.add(f"f{number}.py")
        author = pygit2.Signature("a", "a@example.org", 1000 + number)
        parents = [] if repository.head_is_unborn else [repository.head.target]
        tree = repository.index.write_tree()
        repository.create_commit("HEAD", author, author, f"add {number}", tree, parents)
    return folder


@ON_FILES
@given(seed=st.integers(0, 10**6))
def test_a_damaged_repository_is_read_or_refused(
    seed: int, packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "repo"
    shutil.copytree(packed, folder)
    draw = random.Random(seed)
    files = sorted(file for file in (folder / ".git").rglob("*") if file.is_file())
    for file in draw.sample([file for file in files if "hooks" not in file.parts], 3):
        file.chmod(0o644)
        content = bytearray(file.read_bytes())
        how = draw.randrange(3)
        if how == 0 or not content:
            file.unlink()
        elif how == 1:
            file.write_bytes(content[: draw.randrange(len(content))])
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
    try:
        assert all(is_unicode(d.name + d.text) for d in read_git(folder))
    except DataError as error:
        assert str(folder) in str(error)


def test_large_objects_are_whole(tmp_path: Path) -> None:
    repository = pygit2.init_repository(tmp_path / "repo")
    for content in (b"", b"a" * 999_999, random.Random(0).randbytes(300_000), b"a" * 65_536):
        repository.create_blob(content)
    for file in (tmp_path / "repo" / ".git" / "objects").rglob("??/*"):
        assert _is_whole(file)
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:-5])
        assert not _is_whole(file)


def test_undecodable_names_and_messages_become_text(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    shutil.copytree(packed, folder)
    with open(os.fsencode(folder) + b"/\xff\xfe.py", "wb") as file:
        file.write(b"odd = 1\n")
    (tmp_path / "plain").mkdir()
    with open(os.fsencode(tmp_path / "plain") + b"/\xff.py", "wb") as file:
        file.write(b"odd = 1\n")
    repository = pygit2.Repository(folder)
    repository.index.add_all()
    tree = repository.index.write_tree()
    head = repository.head.target
    raw = f"tree {tree}\nparent {head}\nauthor a <a@b> 99999999999 +0000\n"
    raw += "committer a <a@b> 99999999999 +0000\nencoding no-such-code\n\nodd \udcff message\n"
    commit = repository.odb.write(
        pygit2.enums.ObjectType.COMMIT, raw.encode("utf-8", "surrogateescape")
    )
    repository.set_head(commit)
    documents = [*read_git(folder), *read_folder(tmp_path / "plain")]
    assert any("odd \ufffd message" in document.text for document in documents)
    assert {"repo/\ufffd\ufffd.py", "plain/\ufffd.py"} <= {document.name for document in documents}
    assert all(is_unicode(document.name + document.text) for document in documents)


def linked_repository(packed: Path, folder: Path, how: str) -> tuple[Path, Path]:
    """Return a repository that reads its objects from another folder, and that folder."""
    shared = folder / "shared"
    shutil.copytree(packed, shared)
    path = folder / "linked"
    if how == "worktree":
        pygit2.Repository(shared).add_worktree("linked", path)
        return path, shared / ".git" / "objects"
    repository = pygit2.init_repository(path, initial_head="main")
    pool = folder / "pool"
    shutil.move(shared / ".git" / "objects", pool)
    (path / ".git" / "objects" / "info" / "alternates").write_text(f"{pool}\n")
    shutil.copytree(shared / ".git" / "refs", path / ".git" / "refs", dirs_exist_ok=True)
    shutil.copy(shared / ".git" / "HEAD", path / ".git" / "HEAD")
    assert not repository.head_is_unborn
    return path, pool


@pytest.mark.parametrize("how", ["worktree", "alternates"])
def test_damage_in_a_shared_store_is_refused_not_waited_for(
    packed: Path, tmp_path: Path, how: str
) -> None:
    path, objects = linked_repository(packed, tmp_path, how)
    assert len(list(read_git(path))) == 8
    loose = sorted(objects.glob("??/*"))[0]
    loose.chmod(0o644)
    loose.write_bytes(loose.read_bytes()[:-5])
    with pytest.raises(DataError, match="cut short"):
        open_repository(path)


def test_a_pipe_in_a_repository_is_refused_not_waited_for(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    shutil.copytree(packed, folder)
    (folder / ".git" / "HEAD").unlink()
    os.mkfifo(folder / ".git" / "HEAD")
    with pytest.raises(DataError):
        read_git(folder)


PIECES = [
    "<nav>",
    "</nav>",
    "</p>",
    "<![if x]>",
    "<!--",
    "-->",
    "<a ",
    "</",
    "&amp",
    "<script>",
    "t>",
]


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES) | TEXT, max_size=20))
def test_any_page_has_a_text(pieces: list[str]) -> None:
    html_to_text("".join(pieces))


@pytest.mark.parametrize("piece", [*PIECES, "<nav></p>", "<!x", "<?", "<![CDATA["])
def test_a_page_takes_linear_time(piece: str) -> None:
    started = time.process_time()
    html_to_text(piece * (500_000 // len(piece)))
    html_to_text("<nav>" * 50_000 + piece * (250_000 // len(piece)))
    assert time.process_time() - started < 20
