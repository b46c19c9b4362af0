"""Encode documents as token ids, with path header, fill-in-the-middle and conversation mask; and
cut texts of one length.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek.data.text.document import Document, uniform
from deepseek.errors import DataError
from deepseek.text.chat_template import encode_chat
from deepseek.text.tokenizer import document_end_id, document_start_ids, encode_plain

CONTEXT_BIT = np.uint32(1 << 31)
"""Bit set on stored ids that are context, not targets; every vocabulary is far below 2**31."""

CHUNK = 1 << 16
"""Characters per call of the tokenizer. Longer texts are cut at line ends, so that all cores work
and memory stays small.
"""

FIM_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
"""Fill-in-the-middle tokens (prefix, suffix, middle) of model families; the second is
StarCoder's.
"""


@dataclass(frozen=True)
class EncodeOptions:
    """Options that determine a document's ids, beside the tokenizer.

    Attributes:
        header: whether to put `file: <name>` before code and `commit: <name>` before commits, as
            context, so that the model can use the path; default: True.
        fim_rate: share of code documents to rearrange for fill-in-the-middle; default: 0.0.
        seed: seed that selects these documents and their cuts, by document name; default: 0.
    """

    header: bool = True
    fim_rate: float = 0.0
    seed: int = 0


def header(document: Document) -> str:
    """Return the header line with the name of a file or commit."""
    return f"{'commit' if document.kind == 'commit' else 'file'}: {document.name}\n\n"


def fim_markers(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int], list[int]]:
    """Return the ids that open prefix, suffix and middle.

    A tokenizer without such tokens gets StarCoder's names spelled as text. They work as well after
    training on them, but take a few more ids each.
    """
    vocabulary = tokenizer.get_added_vocab()
    for names in FIM_TOKENS:
        if all(name in vocabulary for name in names):
            prefix, suffix, middle = ([vocabulary[name]] for name in names)
            return prefix, suffix, middle
    prefix, suffix, middle = encode_plain(tokenizer, FIM_TOKENS[1])
    return prefix, suffix, middle


def fim_cuts(document: Document, options: EncodeOptions) -> tuple[int, int] | None:
    """Return the bounds of this document's middle, or None if it is not rearranged."""
    if document.kind != "code" or options.fim_rate <= 0 or len(document.text) < 3:
        return None
    draws = [uniform(f"fim:{options.seed}:{document.name}:{index}") for index in range(3)]
    if draws[0] >= options.fim_rate:
        return None
    start, stop = sorted(1 + int(draw * (len(document.text) - 1)) for draw in draws[1:])
    return start, stop


def pieces(text: str) -> list[str]:
    """Split a long text at line ends into parts of about `CHUNK` characters."""
    parts = []
    start = 0
    while len(text) - start > CHUNK:
        end = text.rfind("\n", start + CHUNK // 2, start + CHUNK) + 1 or start + CHUNK
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


class DocumentEncoder:
    """Encodes documents as stored ids, with one tokenizer and options.

    Args:
        tokenizer: the model's tokenizer.
        options: see `EncodeOptions`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: EncodeOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.start = document_start_ids(tokenizer)
        self.end = document_end_id(tokenizer)
        self.markers = fim_markers(tokenizer) if options.fim_rate > 0 else ([], [], [])

    def encode(self, documents: Sequence[Document]) -> Iterator[NDArray[np.uint32]]:
        """Yield the ids of each document with its end token, and `CONTEXT_BIT` on non-targets."""
        sections = [[pieces(text) for text in self.sections(document)] for document in documents]
        flat = [piece for document in sections for section in document for piece in section]
        encoded = iter(encode_plain(self.tokenizer, flat))
        for document, parts in zip(documents, sections, strict=True):
            ids = [[identity for _ in part for identity in next(encoded)] for part in parts]
            yield self.messages(document) if document.kind == "messages" else self.join(ids)

    def sections(self, document: Document) -> list[str]:
        """Return the texts to encode: none, [head, text], or [head, prefix, suffix, middle]."""
        if document.kind == "messages":
            return []
        head = header(document) if self.options.header and document.kind != "text" else ""
        cuts = fim_cuts(document, self.options)
        if cuts is None:
            return [head, document.text]
        start, stop = cuts
        return [head, document.text[:start], document.text[stop:], document.text[start:stop]]

    def join(self, sections: list[list[int]]) -> NDArray[np.uint32]:
        """Return start, header, text and end tokens, with fill-in-the-middle markers if the text
        was rearranged.

        The header is context, since at inference it is always part of the prompt.
        """
        head, *texts = sections
        if len(texts) == 1:
            body = texts[0]
        else:
            body = [
                identity
                for marker, text in zip(self.markers, texts, strict=True)
                for identity in marker + text
            ]
        ids = np.array([*self.start, *head, *body, self.end], dtype=np.uint32)
        ids[: len(self.start) + len(head)] |= CONTEXT_BIT
        return ids

    def messages(self, document: Document) -> NDArray[np.uint32]:
        """Return the ids of a conversation; only the assistant's tokens are targets."""
        chat = encode_chat(self.tokenizer, document.messages())
        ids = np.array([*chat.ids, self.end], dtype=np.uint32)
        ids[~np.array([*chat.is_target, False])] |= CONTEXT_BIT
        return ids


def long_texts(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    length: int,
    seed: int = 0,
) -> Tensor:
    """Return `count` texts of `length` token ids, `[R, T]`.

    Long documents are used first, each from its start; then shorter ones are concatenated.

    Args:
        documents: the source.
        tokenizer: the model's tokenizer.
        count: number of texts, R.
        length: tokens per text, T.
        seed: seed of the order of the documents; default: 0.

    Raises:
        DataError: there is not enough text.
    """
    encoder = DocumentEncoder(tokenizer, EncodeOptions())
    texts: list[list[int]] = []
    joined: list[int] = []
    for document in sorted(documents, key=lambda item: uniform(f"long:{seed}:{item.name}")):
        ids = (next(encoder.encode([document])) & ~CONTEXT_BIT).tolist()
        if len(ids) >= length:
            texts.append(ids[:length])
        elif len(joined) < count * length:
            joined += ids
        if len(texts) == count:
            break
    while len(texts) < count and len(joined) >= length:
        texts = [*texts, joined[:length]]
        joined = joined[length:]
    if len(texts) < count:
        raise DataError(
            f"The text gives {len(texts)} pieces of {length} tokens, {count} are needed; "
            "add text or ask for less."
        )
    return torch.tensor(texts)
