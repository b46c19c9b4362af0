"""Decode token shards back into documents, to recover a run's training or held-out text even if its
source has changed since.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

from transformers import PreTrainedTokenizerFast

from deepseek.data.text.document import Document, Kind
from deepseek.data.text.encode import CONTEXT_BIT
from deepseek.data.text.shards import TokenShards
from deepseek.text.tokenizer import document_end_id, document_start_ids

HEADER = re.compile(r"(file|commit): ([^\n]+)\n\n")
KINDS: dict[str, Kind] = {"file": "code", "commit": "commit"}


def decode_documents(shards: TokenShards, tokenizer: PreTrainedTokenizerFast) -> Iterator[Document]:
    """Yield the documents of `shards` in order; they must be encoded without fill-in-the-middle.

    Shards do not store the names of prose and conversations, so these are named by position. A
    conversation becomes the text of its turns, without the template's control tokens.
    """
    start = document_start_ids(tokenizer)
    bounds = shards.offsets.tolist()
    for place, (first, stop) in enumerate(pairwise(bounds)):
        tokens = shards.ids_N[first:stop]
        ids = (tokens & ~CONTEXT_BIT).tolist()
        ids = ids[len(start) :] if ids[: len(start)] == start else ids
        ids = ids[:-1] if ids and ids[-1] == document_end_id(tokenizer) else ids
        yield _document(_text(tokenizer, ids), bool(tokens[len(start)] & CONTEXT_BIT), place)


def _document(text: str, has_context: bool, place: int) -> Document:
    """Return the document of a decoded text.

    Args:
        text: the decoded text, with its header if any.
        has_context: whether the first token is context, as a header is.
        place: index of the document in the shards.
    """
    header = HEADER.match(text) if has_context else None
    if header is not None:
        return Document(text[header.end() :], header[2], KINDS[header[1]])
    return Document(text, f"text {place + 1}")


def _text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
