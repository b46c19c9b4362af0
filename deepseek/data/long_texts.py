"""Texts of one length for what looks at whole contexts: long documents cut, short ones joined."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek.data.document import Document, uniform
from deepseek.data.encode import CONTEXT_BIT, DocumentEncoder, EncodeOptions
from deepseek.errors import DataError


def long_texts(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, count: int, length: int, seed: int = 0
) -> Tensor:
    """Return `count` texts of `length` token ids, `[R, T]`, drawn by `seed` and the documents' names.

    Each is the start of a document of at least that length while there are such; then shorter ones are joined.
    Raises `DataError` if all the text is not enough.
    """
    encoder = DocumentEncoder(tokenizer, EncodeOptions())
    texts: list[list[int]] = []
    joined: list[int] = []
    for document in sorted(documents, key=lambda one: uniform(f"long:{seed}:{one.name}")):
        ids = (next(encoder.encode([document])) & ~CONTEXT_BIT).tolist()
        if len(ids) >= length:
            texts.append(ids[:length])
        elif len(joined) < count * length:
            joined += ids
        if len(texts) == count:
            break
    while len(texts) < count and len(joined) >= length:
        texts, joined = [*texts, joined[:length]], joined[length:]
    if len(texts) < count:
        raise DataError(
            f"The text gives {len(texts)} pieces of {length} tokens, {count} are needed; add text or ask for less."
        )
    return torch.tensor(texts)
