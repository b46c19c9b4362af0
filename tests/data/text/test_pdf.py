"""PDF files: their text is extracted, and any file is read or skipped with a reason."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pdf_files import pdf_of, pdf_of_contents, unfolding

from deepseek.data import read_folder
from deepseek.data.builders.questions import all_questions
from deepseek.data.text.filters import MAX_PDF_BYTES, Skipped
from deepseek.data.text.git import read_git
from deepseek.data.text.pdf import (
    joined_words,
    page_lines,
    pdf_to_text,
    with_paragraphs,
    without_running_heads,
)
from deepseek.data.text.pdf_pages import (
    MAX_PAGES,
    TOO_COMPLEX,
    UnreadablePdfError,
    pdf_pages,
    read_pages,
)
from deepseek.data.text.public import read_documents
from deepseek.errors import DataError
from deepseek.retrieval.index import Index

WORD = st.text("abcdefgäéxyz", min_size=1, max_size=8)
LINE = st.lists(WORD, min_size=1, max_size=6).map(" ".join)
PAPER = (
    "1 Introduction",
    "A chaperone is a protein that helps another protein to fold in the cell.",
    "It is of no other use.",
)


@settings(max_examples=20)
@given(st.lists(LINE, min_size=1, max_size=12, unique=True), st.integers(1, 3))
def test_the_text_comes_back(lines: list[str], pages: int) -> None:
    size = -(-len(lines) // pages)
    parts = [lines[start : start + size] for start in range(0, len(lines), size)]
    text = pdf_to_text(pdf_of(*parts))
    assert text.split() == " ".join(lines).split()
    assert [line for line in text.split("\n") if line] == lines


def test_a_folder_of_papers_gives_documents_and_counts_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = pdf_of(["A page."])
    files = {
        "Paper.PDF": pdf_of(PAPER),
        "damaged.pdf": b"%PDF-1.7\n1 0 obj <<",
        "text.pdf": b"no PDF at all",
        "empty.pdf": b"",
        "locked.pdf": pdf_of(PAPER, encrypted=True),
        "scan.pdf": pdf_of([]),
        "bomb.pdf": unfolding(80_000_000),
        "proceedings.pdf": page.replace(b"[4 0 R] /Count 1", b"[%s]" % (b"4 0 R " * 2001)),
    }
    assert MAX_PAGES == 2000
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with open(tmp_path / "vast.pdf", "wb") as file:
        file.truncate(MAX_PDF_BYTES + 1)
    skipped = Skipped()
    (document,) = read_folder(tmp_path, skipped)
    assert document.name == f"{tmp_path.name}/Paper.PDF" and document.kind == "text"
    assert document.text == f"{PAPER[0]}\n\n{PAPER[1]}\n{PAPER[2]}\n"
    assert document.time == int((tmp_path / "Paper.PDF").stat().st_mtime)
    assert skipped == {
        "damaged PDF": 3,
        "encrypted PDF": 1,
        "PDF without text": 1,
        "too complex PDF": 1,
        "too large": 2,
    }
    assert capfd.readouterr() == ("", "")
    assert list(read_folder(tmp_path)) == [document]


def test_a_folder_of_scans_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "scan.pdf").write_bytes(pdf_of([], []))
    with pytest.raises(DataError, match=r"no usable text files \(1 PDF without text\)"):
        list(read_folder(tmp_path))


def test_papers_can_be_searched_and_asked_about(tmp_path: Path) -> None:
    (tmp_path / "paper.pdf").write_bytes(pdf_of(PAPER))
    (document,) = read_documents(tmp_path)
    (passage,) = Index.build([document]).retrieve("What does a chaperone do?")
    assert PAPER[1] in passage.text
    kinds = {question.kind: question.answer for question in all_questions([document])}
    assert kinds["definition"] == PAPER[1]


def test_git_histories_skip_them(repository: Path, commit: object) -> None:
    plain = b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n"
    commit({"paper.pdf": plain, "a.py": "a = 1\n"}, "add", 1)
    skipped = Skipped()
    documents = list(read_git(repository, skipped=skipped))
    assert skipped == {"binary or data": 1}
    assert not any("%PDF" in document.text for document in documents)


def test_the_reader_is_loaded_by_the_other_process_alone(tmp_path: Path) -> None:
    (tmp_path / "paper.pdf").write_bytes(pdf_of(PAPER))
    code = (
        "import sys; from deepseek.data import read_folder; "
        "assert len(list(read_folder(sys.argv[1]))) == 1; assert 'pypdf' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_a_file_that_takes_too_long_is_given_up() -> None:
    texts = [b"BT /F 9 Tf ", b"(word) Tj " * 200_000, b"ET"]
    slow = pdf_of_contents(b"<< /Length 2000014 >>\nstream\n%s\nendstream" % b"".join(texts))
    started = time.monotonic()
    with pytest.raises(UnreadablePdfError, match=TOO_COMPLEX):
        pdf_pages(slow, seconds=1)
    assert time.monotonic() - started < 30


def read_or_refused(data: bytes) -> None:
    try:
        pages = read_pages(data)
    except UnreadablePdfError as error:
        assert "PDF" in str(error) or str(error) == "too large"
    else:
        assert all(isinstance(page, str) for page in pages)


@pytest.mark.filterwarnings("ignore")
@given(st.binary(max_size=400))
@example(b"")
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    read_or_refused(b"%PDF-1.7\n" + data)


@pytest.mark.filterwarnings("ignore")
@given(st.integers(0, 10**6), st.booleans())
def test_a_damaged_file_is_read_or_refused(seed: int, is_cut: bool) -> None:
    draw = random.Random(seed)
    data = bytearray(pdf_of(PAPER, ["Another page."]))
    for _ in range(draw.randrange(1, 12)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    read_or_refused(bytes(data[: draw.randrange(len(data))] if is_cut else data))


def test_running_heads_and_page_numbers_are_dropped() -> None:
    pages = [
        [str(number), f"Journal of Folding {number}", f"Text of {word}.", "}", "Vol. 7"]
        for number, word in enumerate(["one", "two", "three"], 11)
    ]
    for _ in range(2):
        pages = without_running_heads(pages)
    assert pages == [[f"Text of {word}.", "}"] for word in ("one", "two", "three")]


@given(st.lists(st.lists(st.sampled_from(["a", "b", "7", "c 3"]), max_size=4), max_size=2))
def test_what_stands_on_two_pages_stays(pages: list[list[str]]) -> None:
    assert without_running_heads(pages) == pages


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("a pro-\ntein folds", "a protein\nfolds"),
        ("a pro-\ntein, too", "a protein,\ntoo"),
        ("self-\nattention and self-attention", "self-attention\nand self-attention"),
        ("DeepSeek-\nMoE", "DeepSeek-\nMoE"),
        ("3-\nfold", "3-\nfold"),
        ("end -\nstart", "end -\nstart"),
        ("ver-\nfü-\ngen", "verfü-\ngen"),
    ],
)
def test_words_are_joined_at_line_ends(text: str, joined: str) -> None:
    assert joined_words(text) == joined


@pytest.mark.parametrize("hyphen", ["-", "\u00ad", "\u2010"])
def test_a_hyphen_is_one_under_any_of_its_names(hyphen: str) -> None:
    """Word and browsers write the others, since a font has one glyph for all of them."""
    lines = page_lines(f"A well{hyphen}known pro{hyphen}\ntein")
    assert joined_words("\n".join(lines)) == "A well-known protein\n"


@given(st.text("ab-\n .C", max_size=60))
def test_joining_moves_only_hyphens_and_white_space(text: str) -> None:
    letters = str.maketrans("", "", "-\n ")
    assert joined_words(text).translate(letters) == text.translate(letters)


def test_a_short_line_that_ends_a_sentence_ends_a_paragraph() -> None:
    lines = [
        "This line is as long as most lines are.",
        "And this one is short.",
        "2.1. Methods",
        "Here is a line that goes on",
        "to the next. There it ends, but not short.",
        "References",
    ]
    assert with_paragraphs(lines).split("\n\n") == [
        "\n".join(lines[:2]),
        lines[2],
        "\n".join(lines[3:5]),
        f"{lines[5]}\n",
    ]


@pytest.mark.parametrize(
    ("line", "is_heading"),
    [
        ("1 Introduction", True),
        ("2.1. Continued Pre-Training", True),
        ("A.2 Proof of Theorem 3 (sketch)", True),
        ("1.4 Größe der Räume", True),
        ("References", True),
        ("3 Methods 17", False),
        ("1 falls x = y", False),
        ("2 Isometries with f(P) = Q", False),
        ("0 Px", False),
        ("12 proteins fold", False),
        ("4 Results are shown in the table.", False),
        ("References are given", False),
    ],
)
def test_headings_are_numbered_titles(line: str, is_heading: bool) -> None:
    text = with_paragraphs(["before", line, "after"])
    assert text == (f"before\n\n{line}\n\nafter\n" if is_heading else f"before\n{line}\nafter\n")


@given(st.lists(LINE, min_size=1))
def test_paragraphs_keep_all_lines(lines: list[str]) -> None:
    assume(all(lines))
    assert [line for line in with_paragraphs(lines).split("\n") if line] == lines


def test_characters_of_fonts_become_plain() -> None:
    assert page_lines("of\ufb01ce\x00\x0f \ud835\n\n  e\ufb00ect") == ["office \ufffd", "effect"]


@pytest.mark.parametrize("piece", ["a", "a-", "a-\n", "1", "1.", " ", "-\n", "A.1"])
def test_a_long_text_takes_linear_time(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    started = time.process_time()
    with_paragraphs(joined_words(text).splitlines())
    without_running_heads([page_lines(text)] * 3)
    assert time.process_time() - started < 20
