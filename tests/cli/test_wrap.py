"""Word wrap: lines fit, words stay whole, and only line breaks are added."""

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from deepseek.cli.wrap import WordWrap


def wrapped(pieces: list[str], width: int) -> str:
    """Return the printed output for pieces of text."""
    printed: list[str] = []
    wrap = WordWrap(width, lambda text, _style: printed.append(text))
    for piece in pieces:
        wrap.write(piece)
    wrap.close()
    return "".join(printed)


PIECES = st.lists(st.text("ab c\n日", max_size=12), max_size=12)


@given(PIECES, st.integers(4, 30))
def test_lines_fit_and_words_stay_whole(pieces: list[str], width: int) -> None:
    text = "".join(pieces)
    printed = wrapped(pieces, width)
    for line in printed.split("\n"):
        words = line.split()
        assert cell_len(line.rstrip()) <= width or len(words) == 1 or line[:1] == " "
    assert "".join(printed.split()) == "".join(text.split())
    if "日" not in text:  # lines may break between wide characters
        assert printed.split() == text.split()


@given(PIECES, st.integers(4, 30))
def test_how_the_text_is_cut_changes_nothing(pieces: list[str], width: int) -> None:
    assert wrapped(pieces, width) == wrapped(list("".join(pieces)), width)


@given(PIECES)
def test_text_that_fits_is_unchanged(pieces: list[str]) -> None:
    assert wrapped(pieces, 1000) == "".join(pieces)


def test_code_keeps_its_lines() -> None:
    code = "```python\nvalue = some_function(argument, another_argument)\n```\nwords that wrap here"
    printed = wrapped([code], 12)
    assert "value = some_function(argument, another_argument)\n" in printed
    assert "words that wrap here" not in printed


def test_a_file_gets_the_text_as_it_is() -> None:
    console = Console(file=io.StringIO(), width=10)
    printed: list[str] = []
    wrap = WordWrap.on(console, lambda text, _style: printed.append(text))
    wrap.write("one two three four")
    assert printed == ["one two three four"]


def test_styles_stay_with_their_letters() -> None:
    printed: list[tuple[str, str]] = []
    wrap = WordWrap(80, lambda text, style: printed.append((text, style)))
    wrap.write("un", "red")
    wrap.write("plug ", "blue")
    wrap.close()
    assert [part for part in printed if part[0].strip()] == [("un", "red"), ("plug", "blue")]
