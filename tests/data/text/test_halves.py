"""Held-out text is halved into two disjoint parts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from deepseek.data.text.document import Document
from deepseek.data.text.halves import LONGEST_WORD, SMALLEST_PART, changed_files, halve
from deepseek.text.chat_template import encode_chat

LINES = st.lists(
    st.integers(0, 10**9).map("line {}\n".format), min_size=1, max_size=40, unique=True
)
DOCUMENTS = st.lists(LINES, min_size=1, max_size=12).map(
    lambda texts: [
        Document(
            "".join(f"{number} {line}" for line in lines),
            f"folder-{number % 3}/{number}.txt",
            time=number + 1,
        )
        for number, lines in enumerate(texts)
    ]
)


def words_of(documents: list[Document]) -> list[str]:
    return sorted(word for document in documents for word in document.text.split())


@given(DOCUMENTS, st.sampled_from(["file", "directory", "time"]), st.integers(0, 3))
def test_every_word_is_in_one_part_alone(documents: list[Document], by: str, seed: int) -> None:
    validation, test = halve(documents, by, seed)  # type: ignore[arg-type]
    assert sorted([*words_of(validation), *words_of(test)]) == words_of(documents)
    assert test, "there is always something to report on"


@given(DOCUMENTS, st.sampled_from(["file", "directory", "time"]))
def test_neither_part_is_small_where_text_can_be_cut(documents: list[Document], by: str) -> None:
    validation, test = halve(documents, by)  # type: ignore[arg-type]
    sizes = [sum(len(document.text) for document in part) for part in (validation, test)]
    longest_line = max(
        len(line) for document in documents for line in document.text.splitlines(keepends=True)
    )
    assert min(sizes) >= SMALLEST_PART * sum(sizes) - len(documents) * longest_line


@given(
    st.sampled_from(["", "Title\n", "One line. "]),
    st.text("ab \n", min_size=1),
    st.integers(4 * LONGEST_WORD, 500),
)
def test_a_document_is_cut_near_its_middle_wherever_its_lines_end(
    begin: str, body: str, times: int
) -> None:
    text = begin + body * times
    ((first,), (second,)) = halve([Document(text, "alone")])
    assert first.text + second.text == text
    assert min(len(first.text), len(second.text)) >= SMALLEST_PART * len(text)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a b\nc d e f", "a b\n"),
        ("a\nb c d e f g", "a\nb c "),
        ("a sentence b", "a "),
        ("a\nsentence b", "a\n"),
        ("abcd", "ab"),
    ],
)
def test_a_cut_prefers_the_end_of_a_line_to_that_of_a_word(text: str, first: str) -> None:
    assert halve([Document(text, "alone")])[0][0].text == first


@given(st.lists(st.integers(1, 10**9), min_size=8, max_size=30, unique=True))
def test_by_time_the_test_part_is_the_later_one(times: list[int]) -> None:
    documents = [Document("text of one size", f"{time}", time=time) for time in times]
    validation, test = halve(documents, "time")
    assert max(document.time for document in validation) < min(document.time for document in test)


def test_directories_stay_together() -> None:
    documents = [Document("some text", f"folder-{index % 6}/{index}") for index in range(60)]
    validation, test = halve(documents, "directory")
    folders = [{document.name.split("/")[0] for document in part} for part in (validation, test)]
    assert folders[0] and folders[1] and not folders[0] & folders[1]


def test_a_file_keeps_its_part_at_every_call() -> None:
    documents = [Document(f"text {index}", f"{index}") for index in range(30)]
    assert halve(documents) == halve(list(reversed(documents)))


def test_one_conversation_is_cut_between_messages() -> None:
    messages = [
        {"role": role, "content": f"{index}\nmore"}
        for index in range(3)
        for role in ("user", "assistant")
    ]
    validation, test = halve([Document(json.dumps(messages), "chat", "messages")])
    assert json.loads(validation[0].text) + json.loads(test[0].text) == messages
    for short in (messages[:1], messages[:2], messages[:3]):
        alone = Document(json.dumps(short), "chat", "messages")
        assert halve([alone]) == ([], [alone])


@given(st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=9))
def test_each_part_of_a_conversation_has_an_answer_to_learn(roles: list[str]) -> None:
    messages = [{"role": role, "content": f"{index}"} for index, role in enumerate(roles)]
    validation, test = halve([Document(json.dumps(messages), "chat", "messages")])
    tokenizer = tiny_tokenizer()
    for part in [*validation, *(test if validation else [])]:
        assert any(encode_chat(tokenizer, json.loads(part.text)).is_target)
    pairs = "".join(role[0] for role in roles).count("ua")
    assert bool(validation) >= (pairs > 1), "two questions with answers can be cut"


def conversation_of(length: int, number: int) -> Document:
    """Return a conversation of one question and one answer, which cannot be cut."""
    messages = [
        {"role": "user", "content": f"question {number}"},
        {"role": "assistant", "content": "a" * length},
    ]
    return Document(json.dumps(messages), f"chats.jsonl:{number}", "messages", time=number)


@given(
    st.lists(st.integers(1, 900), min_size=2, max_size=12),
    st.sampled_from(["file", "time"]),
    st.integers(0, 3),
)
def test_conversations_that_cannot_be_cut_are_divided_as_they_are(
    lengths: list[int], by: str, seed: int
) -> None:
    documents = [conversation_of(length, number) for number, length in enumerate(lengths)]
    validation, test = halve(documents, by, seed)  # type: ignore[arg-type]
    assert validation and test
    assert {document.name for document in [*validation, *test]} == {
        document.name for document in documents
    }
    assert len(validation) + len(test) == len(documents)


def test_half_a_note_is_no_validation_where_whole_conversations_are_more() -> None:
    documents = [conversation_of(10, 0), conversation_of(900, 1), Document("two words", "note.txt")]
    parts = halve(documents)
    assert min(sum(len(document.text) for document in part) for part in parts) > 50


def test_a_commit_is_in_the_half_of_the_files_that_it_changes() -> None:
    def patch(number: int) -> str:
        return f"--- {number}.py\n+++ {number}.py\n@@\n+line {number}\n"

    files = [Document(f"line {number}\n" * 9, f"r/{number}.py", "code") for number in range(12)]
    commits = [
        Document(f"Change\n\n{patch(n)}{patch((n + 1) % 12)}", f"r@{n}", "commit")
        for n in range(12)
    ]
    halves = halve([*files, *commits])
    names = [{one.name for one in half if one.kind == "code"} for half in halves]
    for half, other in zip(halves, names[::-1], strict=True):
        changed = {name for one in half if one.kind == "commit" for name in changed_files(one)}
        assert changed.isdisjoint(other)
    assert sum(len(half) for half in halves) == 24


def test_commits_show_no_line_of_the_other_half_of_a_file_that_is_cut() -> None:
    """One file and the commits that wrote it: whole documents do not give fair halves."""
    lines = [f"line {number}\n" for number in range(200)]
    commits = [
        Document(f"Add\n\n--- a.py\n+++ a.py\n@@\n{added}", f"r@{start}", "commit")
        for start in range(0, 200, 40)
        if (added := "".join(f"+{line}" for line in lines[start : start + 40]))
    ]
    validation, test = halve([Document("".join(lines), "r/a.py", "code"), *commits])
    seen = {line.lstrip("+") for one in validation for line in one.text.splitlines()}
    asked = {line.lstrip("+") for one in test for line in one.text.splitlines()}
    assert {line for line in seen & asked if line.startswith("line")} == set()
    assert len(asked) > 90
