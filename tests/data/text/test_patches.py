"""The parts of a commit's document: together they give its text, and each names its file."""

from hypothesis import given
from hypothesis import strategies as st

from deepseek.data.text.patches import NOWHERE, Patch, message_and_patches

LINES = st.text("-+ @xy/", max_size=12).filter(lambda line: not line.startswith("-- "))
PATHS = st.text("abc ./-+", min_size=1, max_size=8)
HUNKS = st.lists(st.tuples(st.sampled_from("+- "), LINES), min_size=1, max_size=6)


@st.composite
def patches(draw: st.DrawFn) -> Patch:
    """Draw the changes of a file, as the reader of git histories writes them."""
    path = draw(PATHS)
    before, after = draw(st.sampled_from([(path, path), (NOWHERE, path), (path, NOWHERE)]))
    hunks = draw(st.lists(HUNKS, min_size=1, max_size=3))
    lines = ["@@ def f():\n" + "".join(f"{sign}{line}\n" for sign, line in hunk) for hunk in hunks]
    return Patch(f"--- {before}\n+++ {after}\n{''.join(lines)}", before, after)


@given(st.lists(LINES.map(lambda line: f"> {line}\n")), st.lists(patches(), max_size=4))
def test_the_parts_of_a_commit_are_its_message_and_its_patches(
    message: list[str], changes: list[Patch]
) -> None:
    whole = "".join([*message, "\n", *(patch.text for patch in changes)])
    first, found = message_and_patches(whole)
    assert "".join([first, *(patch.text for patch in found)]) == whole
    assert [(patch.before, patch.after) for patch in changes] == [
        (patch.before, patch.after) for patch in found
    ]
    assert all(patch.path != NOWHERE for patch in found)


def test_a_removed_comment_before_an_added_line_is_no_header() -> None:
    text = "Fix\n\n--- a.sql\n+++ a.sql\n@@\n--- old comment\n+++ i\n select 1;\n"
    message, (patch,) = message_and_patches(text)
    assert (message, patch.path) == ("Fix\n\n", "a.sql")
