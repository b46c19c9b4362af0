"""Gaps in code: no text is lost, and gaps are like those that an editor asks for."""

from hypothesis import given
from hypothesis import strategies as st

from deepseek.data.text.document import Document
from deepseek.data.text.gaps import EXCERPT, excerpts, gap, with_gaps

LINES = st.lists(st.text("ab =(\t ", max_size=60), max_size=80)


@given(LINES, st.integers(0, 5))
def test_excerpts_with_gaps_hold_the_whole_text(lines: list[str], seed: int) -> None:
    document = Document("\n".join(lines), "repo/f.py", "code")
    parts = with_gaps([document], 1.0, seed)
    assert parts == with_gaps([document], 1.0, seed)
    text = ""
    for part in parts:
        if part.kind == "infill":
            prefix, suffix, middle = part.gap()
            assert middle and not middle.endswith("\n")
            text += prefix + middle + suffix
        else:
            assert part.kind == "code" and not part.text.strip()
            text += part.text
    assert text == document.text
    assert len({part.name for part in parts}) == len(parts)


@given(LINES)
def test_excerpts_end_at_line_ends(lines: list[str]) -> None:
    pieces = excerpts("\n".join(lines))
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert all(len(piece) <= EXCERPT for piece in pieces)


def test_most_gaps_are_the_rest_of_a_line() -> None:
    text = "".join(f"    name_{number} = value({number})\n" for number in range(20))
    gaps = [gap(text, str(key)) for key in range(300)]
    middles = [text[place[0] : place[1]] for place in gaps if place is not None]
    one_line = sum("\n" not in middle for middle in middles)
    whole = sum(middle.startswith("    ") for middle in middles)
    assert 150 < one_line < 210
    assert 60 < whole < 120
    assert max(middle.count("\n") for middle in middles) == 4


def test_the_share_holds_and_prose_has_no_gaps() -> None:
    files = [Document("def f(): return 1\n", f"repo/{number}.py", "code") for number in range(400)]
    prose = Document("Once upon a time\n", "repo/0.md", "text")
    mixed = with_gaps([*files, prose], 0.5, 0)
    assert 150 < sum(document.kind == "infill" for document in mixed) < 250
    assert mixed[-1] is prose
    assert with_gaps(files, 0.0, 0) == files
