"""Folders, JSONL, Parquet and HTML: what is read, and the message for each error."""

import gzip
import json
import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.data import read_folder, read_records
from deepseek.data.text.filters import Skipped, decode, file_document
from deepseek.data.text.pages import html_to_text
from deepseek.data.text.public import read_documents
from deepseek.errors import DataError


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_folder_gives_its_texts_sorted_and_counts_the_rest(tmp_path: Path) -> None:
    root = tmp_path / "shelf"
    (root / "sub").mkdir(parents=True)
    (root / "node_modules").mkdir()
    (root / "node_modules" / "x.js").write_text("vendored")
    (root / "sub" / "b.md").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (root / "a.py").write_text("a = 1\n")
    (root / "photo.jpg").write_bytes(b"\xff\xd8")
    (root / "page.html").write_text("<head><title>t</title></head><p>Hello <b>you</b>")
    os.symlink(root, root / "loop")
    os.mkfifo(root / "pipe.txt")
    skipped = Skipped()
    found = list(read_folder(root, skipped))
    assert [(d.name, d.kind, d.text) for d in found] == [
        ("shelf/a.py", "code", "a = 1\n"),
        ("shelf/page.html", "text", "Hello you\n"),
        ("shelf/sub/b.md", "text", "one\ntwo"),
    ]
    assert skipped == {
        "binary or data": 1,
        "link to a folder": 1,
        "not a file": 1,
        "vendored or built": 1,
    }
    assert [d.name for d in read_folder(root / "a.py")] == ["shelf/a.py"]


def test_an_empty_or_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_folder(tmp_path / "missing")
    (tmp_path / "a.png").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"no usable text files \(1 binary or data\)"):
        list(read_folder(tmp_path))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("grüß".encode(), "grüß"),
        ("grüß".encode("utf-16"), "grüß"),
        ("grüß".encode("latin-1"), None),
        ("grüß".encode("utf-32"), None),
        ("grüß".encode("utf-32-be"), None),
        (b"\xff\xfea", None),
        (b"a\0b", None),
        (b"a\r\nb\rc", "a\nb\nc"),
    ],
)
def test_only_unicode_text_is_decoded(data: bytes, text: str | None) -> None:
    assert decode(data) == text


@given(st.text(min_size=1), st.sampled_from(["latin-1", "cp1252", "utf-16-le", "utf-32"]))
def test_text_in_another_encoding_is_named_so_unless_it_looks_binary(
    text: str, encoding: str
) -> None:
    data = text.encode(encoding, "ignore")
    decoded = decode(data)
    skipped = Skipped()
    document = file_document(data, "a.txt", "a.txt", 0, skipped)
    if decoded is None:
        assert skipped == {"binary or data" if b"\0" in data else "not UTF-8": 1}
        return
    assert "\0" not in decoded
    assert (document is None) == (not decoded.strip())


def test_folders_that_are_not_entered_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("src", "src/dist", "target", "locked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text(f"name = '{name}'\n")
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    is_file = Path.is_file

    def guarded_is_file(path: Path) -> bool:
        if path.parent.name == "locked":  # its files cannot be inspected either
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(os, "scandir", guarded)
    monkeypatch.setattr(Path, "is_file", guarded_is_file)
    skipped = Skipped()
    assert [d.text for d in read_folder(tmp_path, skipped)] == ["name = 'src'\n"]
    assert skipped == {"vendored or built": 2, "unreadable": 1}


def test_a_folder_of_links_to_folders_says_why_it_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.txt").write_text("text\n")
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "papers").symlink_to(tmp_path / "papers")
    (shelf / "round").symlink_to(shelf)
    with pytest.raises(DataError, match=r"no usable text files \(2 link to a folder\)"):
        list(read_folder(shelf))
    (shelf / "b.txt").write_text("text\n")
    assert [document.name for document in read_folder(shelf)] == ["shelf/b.txt"]


def test_links_that_lead_out_of_the_folder_are_not_read(tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (tmp_path / "private.txt").write_text("PRIVATE\n")
    (shelf / "a.txt").write_text("text\n")
    (shelf / ".netrc").write_text("machine x password y\n")
    (shelf / "b.txt").symlink_to("a.txt")
    (shelf / "c.txt").symlink_to("../private.txt")
    (shelf / "d.txt").symlink_to(".netrc")
    (shelf / "vendor").mkdir()
    (shelf / "vendor" / "x.txt").write_text("of others\n")
    (shelf / "e.txt").symlink_to("vendor/x.txt")
    (shelf / "f.txt").symlink_to("g.txt")
    (shelf / "g.txt").symlink_to("f.txt")
    skipped = Skipped()
    assert [d.name for d in read_folder(shelf, skipped)] == ["shelf/a.txt", "shelf/b.txt"]
    assert skipped == {
        "credentials": 2,
        "link out of the folder": 1,
        "vendored or built": 2,
        "unreadable": 2,
    }


CREDENTIALS = [".env", ".env.production", ".netrc", ".pgpass", ".npmrc", ".git-credentials"]
CREDENTIALS += [".envrc", "prod.env", "db.prod.env", ".my.cnf", ".env-prod"]
NO_CREDENTIALS = [".env.example", ".env.sample", ".env.local.template", "env.py", ".envrc.md"]
NO_CREDENTIALS += [".env-example", "example.env", ".sample.env", "my.cnf.txt", "prod.env.md", "env"]


def test_files_of_passwords_are_not_read(tmp_path: Path) -> None:
    for name in [*CREDENTIALS, *NO_CREDENTIALS, ".htpasswd"]:
        (tmp_path / name).write_text(f"PASSWORD=hunter2 # {name}\n")
    skipped = Skipped()
    found = {Path(document.name).name for document in read_folder(tmp_path, skipped)}
    assert found == set(NO_CREDENTIALS)
    assert skipped == {"credentials": len(CREDENTIALS) + 1}


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028"])
def test_the_name_of_a_file_stands_on_one_line(tmp_path: Path, end: str) -> None:
    (tmp_path / f"a{end}b.py").write_text("a = 1\n")
    assert [d.name for d in read_folder(tmp_path)] == [f"{tmp_path.name}/a\ufffdb.py"]


def test_jsonl_knows_text_messages_and_preferences(tmp_path: Path) -> None:
    ask, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    path = write_lines(
        tmp_path / "d.jsonl",
        {"text": "plain", "time": 5},
        {"messages": [ask, {**answer, "extra": 1}]},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": [ask], "chosen": [answer], "rejected": []},
        {"prompt": [ask], "chosen": [ask, answer]},
    )
    documents = list(read_records(path))
    assert (documents[0].text, documents[0].name, documents[0].time) == ("plain", "d.jsonl:1", 5)
    assert [document.messages() for document in documents[1:]] == [[ask, answer]] * 4


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('{"txt": "x"}', "line 2 has no `text`.*but txt"),
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is a list"),
        ('{"text": 3}', "line 2: `text` is 3, no text"),
        ('{"messages": ["hi"]}', "line 2: message 1 needs"),
        ('{"messages": [{"role": "user", "content": null}]}', "line 2: message 1 needs"),
        ('{"prompt": 3, "chosen": "x"}', "line 2: message 1 needs"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, cause: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(DataError, match=cause):
        list(read_records(path))


def test_files_that_are_no_jsonl_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    latin = '{"text": "u"}\n' * 2000 + '{"text": "ü"}'
    (tmp_path / "latin.jsonl").write_bytes(latin.encode("latin-1"))
    for name, cause in [
        ("empty.jsonl", "is empty"),
        ("latin.jsonl", r"not UTF-8 \(line 2001\)"),
        ("gone.jsonl", "does not exist"),
    ]:
        with pytest.raises(DataError, match=cause):
            list(read_records(tmp_path / name))


def test_text_to_measure_may_be_compressed(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "d.jsonl", {"text": "Ein Satz.\n" * 9})
    compressed = tmp_path / "d.jsonl.gz"
    compressed.write_bytes(gzip.compress(lines.read_bytes()))
    texts = [[document.text for document in read_documents(path)] for path in (lines, compressed)]
    assert texts[0] == texts[1] and texts[0]
    (tmp_path / "d.gz").write_bytes(compressed.read_bytes())
    with pytest.raises(DataError, match="is neither a folder nor"):
        list(read_documents(tmp_path / "d.gz"))


def test_parquet_gives_what_jsonl_gives(tmp_path: Path) -> None:
    records = [{"text": f"text {number}", "time": number} for number in range(2500)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    rows = list(read_records(tmp_path / "d.parquet"))
    lines = list(read_records(write_lines(tmp_path / "d.jsonl", *records)))
    assert [(d.text, d.time) for d in rows] == [(d.text, d.time) for d in lines]
    assert rows[2499].name == "d.parquet:2500"


def test_columns_that_nobody_reads_do_no_harm(tmp_path: Path) -> None:
    largest = pa.array([2**63 - 1], pa.int64())
    columns = {
        "text": ["hello"],
        "shot": largest.cast(pa.timestamp("ns")),  # Python has no nanoseconds
        "expires": pa.array([3_000_000], pa.date32()),  # nor the year 10183
        "raw": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers()),
    }
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    [document] = read_records(tmp_path / "d.parquet")
    assert document.text == "hello"
    pq.write_table(pa.table({**columns, "body": ["x"]}).drop(["text"]), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"has no `text`.* but body, expires, raw, shot"):
        list(read_records(tmp_path / "e.parquet"))


def test_files_that_are_no_parquet_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    cases = [
        ("bad", "cannot be read"),
        ("gone", "does not exist"),
        ("none", "is empty"),
        ("other", "line 1 has no `text`"),
    ]
    for name, cause in cases:
        with pytest.raises(DataError, match=cause):
            list(read_records(tmp_path / f"{name}.parquet"))


def test_html_keeps_reading_order_and_drops_furniture() -> None:
    page = """<html><head><script>var x = "<p>no</p>";</script><title>no</title><body><nav>menu</nav>
    <h1>Title</h1><p>One   &amp; <i>two</i>
    three<ul><li>a<li>b</ul><pre>def f():
        return  1
    </pre></nav><table><tr><td>x</td><td>y</td></table><footer>no"""
    expected = "Title\n\nOne & two three\n\n- a\n- b\n\ndef f():\n        return  1\n\n  x  y\n"
    assert "\n".join(line.rstrip() for line in html_to_text(page).splitlines()) + "\n" == expected


@pytest.mark.parametrize(
    ("page", "lines"),
    [
        ("<form><h1>Title</h1><p>All of it</p></form>", ["Title", "All of it"]),
        ("<p>a</p><table><form><tr><td>x</td></tr></table><p>rest</p>", ["a", "x", "rest"]),
        ("<article><header><h1>Title</h1></header><p>text</p></article>", ["Title", "text"]),
        ("<header>menu</header><main><p>text</p></main><header>menu</header>", ["text"]),
        ("<html><head><title>no</title><h1>Title</h1><p>text", ["Title", "text"]),
        ("<head><noscript><p>no</p></noscript><title>no</title></head>text", ["text"]),
    ],
)
def test_forms_and_heads_of_articles_are_text(page: str, lines: list[str]) -> None:
    assert [line.strip() for line in html_to_text(page).splitlines() if line.strip()] == lines


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<ul><li><p>First</p></li>\n<li>\n<p>Second</p>\n</li></ul>", "- First\n\n- Second\n"),
        ("<ul><li><div><p>a</p></div><p>b</p><p>c</p></li></ul>", "- a\n\nb\n\nc\n"),
        ("<p>a</p><nav><td>x</td></nav>b", "a\nb\n"),
        ("<ul><li><p>a</p>b</li></ul>", "- a\nb\n"),
        ("<ul><li><p>a</p><ul><li><p>b</p></li></ul></li></ul>", "- a\n\n- b\n"),
        ("<p>x<table><tr><td><p>a</p></td><td><p>b</p></td></tr></table>y", "x\n\n  a  b\n\ny\n"),
        ("<p>x<table><tr><th><div><p>a</p></div><td><p>b<tr><td><p>c", "x\n\n  a  b\n  c\n"),
        ("<p>x<table><tr><td><p>a</p><p>b</p></td><td>c</td></tr>", "x\n\n  a\n\nb  c\n"),
    ],
)
def test_a_paragraph_in_an_item_or_a_cell_starts_no_line(page: str, text: str) -> None:
    """Sphinx writes its lists and tables so."""
    assert html_to_text(page) == text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<details><summary>More</summary>It is long.</details>end", "More\nIt is long.\nend\n"),
        ("<address>Paris</address><address>Rome</address>", "Paris\nRome\n"),
        ("<figure><figcaption>Figure 1</figcaption><img>A cat</figure>", "Figure 1\nA cat\n"),
        ("<table><caption>Prices</caption>In euros<tr><td>1", "Prices\nIn euros\n  1\n"),
        ("<fieldset><legend>Name</legend>Your own</fieldset>", "Name\nYour own\n"),
        ("<title>Of a page without a head</title>Text<p>More", "Text\nMore\n"),
    ],
)
def test_texts_of_blocks_are_not_glued_together(page: str, text: str) -> None:
    lines = [line for line in html_to_text(page).split("\n") if line]
    assert lines == text.split("\n")[:-1]


def test_hyphens_that_no_browser_shows_part_no_words() -> None:
    page = "<p>Donau&shy;dampf\u00adschiff</p><pre>a\u00adb</pre>"
    assert html_to_text(page) == "Donaudampfschiff\n\na\u00adb\n"


@given(st.text("ab &;#T\n", min_size=1))
def test_the_last_text_of_a_page_needs_no_end_tag(text: str) -> None:
    assert html_to_text(f"<p>First</p><p>{text}") == html_to_text(f"<p>First</p><p>{text}</p>")


@pytest.mark.parametrize("tag", ["nav", "footer", "aside", "header"])
def test_lists_and_tables_in_furniture_leave_no_marks(tag: str) -> None:
    inside = "<ul><li><a href=x>Home</a><li>About</ul><table><tr><td>x</td><th>y</table>"
    page = f"<{tag}>{inside}</{tag}><p>Hello</p><{tag}>{inside}</{tag}><ul><li>kept</ul>"
    assert html_to_text(page).split("\n") == ["Hello", "", "- kept", ""]


def test_what_the_library_writes_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, a run's held-out questions are stored with their answers."""
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    for name in ("home/models/own", "run/corpus", "start"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "questions.jsonl").write_text('{"set": "held out"}')
    (tmp_path / "run" / "start.json").write_text('{"inputs": {}, "request": {}}')
    (tmp_path / "start" / "start.json").write_text('{"scripts": {}}')  # not ours
    skipped = Skipped()
    names = [document.name for document in read_folder(tmp_path, skipped)]
    assert names == [f"{tmp_path.name}/start/{file}" for file in ("questions.jsonl", "start.json")]
    assert skipped == {"written by deepseek": 2}


def test_dates_of_parquet_files_are_times(tmp_path: Path) -> None:
    column = pa.array([datetime(2026, 11, 29, tzinfo=UTC)], pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({"text": ["text"], "time": column}), tmp_path / "t.parquet")
    assert [one.time for one in read_records(tmp_path / "t.parquet")] == [1795910400]


def test_a_date_without_a_zone_is_of_utc_and_may_be_of_any_year(tmp_path: Path) -> None:
    """Some programs write the first day of year 1 instead of no date."""
    for column in (pa.array([20_786], pa.date32()), pa.array(["2026-11-29T00:00:00Z"])):
        pq.write_table(pa.table({"text": ["text"], "time": column}), tmp_path / "t.parquet")
        assert [one.time for one in read_records(tmp_path / "t.parquet")] == [1795910400]
    column = pa.array([datetime(2026, 11, 29), datetime(1, 1, 1)], pa.timestamp("us"))
    pq.write_table(pa.table({"text": ["a", "b"], "time": column}), tmp_path / "t.parquet")
    times = [one.time for one in read_records(tmp_path / "t.parquet")]
    assert times == [1795910400, -62135596800]


def test_a_long_book_is_read(tmp_path: Path) -> None:
    """A source file of that size would be treated as data and skipped."""
    text = "A line of a book.\n" * 100_000
    for name in ("book.txt", "table.py"):
        (tmp_path / name).write_text(text)
    skipped = Counter[str]()
    assert [one.name for one in read_folder(tmp_path, skipped)] == [f"{tmp_path.name}/book.txt"]
    assert skipped == {"too large": 1}
