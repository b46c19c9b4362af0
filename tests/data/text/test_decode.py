"""Documents can be restored from token shards."""

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from deepseek.data import Document, TokenShards, read_folder
from deepseek.data.text.decode import decode_documents
from deepseek.data.text.document import conversation

TOKENIZER = tiny_tokenizer()
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=80)


@given(st.lists(st.tuples(TEXT, st.sampled_from(["code", "commit"])), min_size=1, max_size=5))
def test_code_and_commits_come_back_as_they_were(
    tmp_path_factory: object, texts: list[tuple[str, str]]
) -> None:
    documents = [
        Document(text, f"repo/{place}.py", kind) for place, (text, kind) in enumerate(texts)
    ]
    folder: Path = tmp_path_factory.mktemp("shards") / "x"
    shards = TokenShards.build(documents, TOKENIZER, folder)
    assert list(decode_documents(shards, TOKENIZER)) == documents


def test_prose_and_conversations_come_back_as_text(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    documents = [Document("file: x\n\nOnce", "book"), conversation(turns, "c", "c")]
    prose, chat = decode_documents(
        TokenShards.build(documents, TOKENIZER, tmp_path / "x"), TOKENIZER
    )
    assert prose == Document("file: x\n\nOnce", "text 1")
    assert chat.kind == "text" and "why?" in chat.text and "because" in chat.text


def test_a_file_whose_name_has_line_breaks_stays_code(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a\nb.py").write_text("a = 1\n")
    documents = list(read_folder(tmp_path / "code"))
    shards = TokenShards.build(documents, TOKENIZER, tmp_path / "x")
    found = [replace(document, time=0) for document in documents]
    assert list(decode_documents(shards, TOKENIZER)) == found
    assert found[0].kind == "code"
