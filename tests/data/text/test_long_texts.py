"""Texts of one length: long documents are cut, short ones joined; too little text is an error."""

import pytest
from tiny_tokenizer import tiny_tokenizer

from deepseek.data.text.document import Document
from deepseek.data.text.encode import long_texts
from deepseek.errors import DataError
from deepseek.text.tokenizer import encode_plain


def words(count: int, name: str) -> Document:
    return Document(" ".join(f"{name}{number}" for number in range(count)), name)


def test_long_documents_are_cut_and_short_ones_joined() -> None:
    tokenizer = tiny_tokenizer()
    documents = [words(400, "long"), *(words(20, f"short{number}") for number in range(30))]
    texts = long_texts(documents, tokenizer, 2, 200)
    assert texts.shape == (2, 200)
    ids, row = encode_plain(tokenizer, [documents[0].text])[0], texts[0].tolist()
    head = row.index(ids[0])  # what a tokenizer puts before a document
    assert row[head:] == ids[: 200 - head]
    assert texts[1].tolist() != row
    assert texts.equal(long_texts(reversed(documents), tokenizer, 2, 200))
    assert not texts.equal(long_texts(documents[1:], tokenizer, 2, 200, seed=1))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="2 are needed"):
        long_texts([words(30, "a")], tiny_tokenizer(), 2, 10_000)
