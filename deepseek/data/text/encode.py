"""One document to token ids: path header, fill-in-the-middle, conversation mask, end; and texts of
one length.
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
"""Set on a stored id that is context only, never a target; no vocabulary comes near 2**31."""

CHUNK = 1 << 16
"""Characters encoded at once; a longer text is cut at a line end, so that all cores work and memory
stays small.
"""

FIM_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
"""Names under which model families know (prefix, suffix, middle); the second is StarCoder's."""


@dataclass(frozen=True)
class EncodeOptions:
    """What decides the ids of a document beside the tokenizer.

    Attributes:
        header: put `file: <name>` before code and commits, as context, so that the model can use
            where a text lies.
        fim_rate: share of code documents rearranged for fill-in-the-middle (prefix, suffix,
            middle).
        seed: draws which documents and where they are cut, by document name.
    """

    header: bool = True
    fim_rate: float = 0.0
    seed: int = 0


def header(document: Document) -> str:
    """Return the line that tells a model which file or commit follows, empty for prose and
    conversations.
    """
    return f"{'commit' if document.kind == 'commit' else 'file'}: {document.name}\n\n"


def fim_markers(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int], list[int]]:
    """Return the ids that open prefix, suffix and middle; without such tokens StarCoder's names
    spelled as text.

    Spelled markers work just as well after training on them, at a few more ids each.
    """
    vocabulary = tokenizer.get_added_vocab()
    for names in FIM_TOKENS:
        if all(name in vocabulary for name in names):
            prefix, suffix, middle = ([vocabulary[name]] for name in names)
            return prefix, suffix, middle
    prefix, suffix, middle = encode_plain(tokenizer, FIM_TOKENS[1])
    return prefix, suffix, middle


def fim_cuts(document: Document, options: EncodeOptions) -> tuple[int, int] | None:
    """Return where this document's middle begins and ends, or None if it stays in reading order."""
    if document.kind != "code" or options.fim_rate <= 0 or len(document.text) < 3:
        return None
    draws = [uniform(f"fim:{options.seed}:{document.name}:{index}") for index in range(3)]
    if draws[0] >= options.fim_rate:
        return None
    start, stop = sorted(1 + int(draw * (len(document.text) - 1)) for draw in draws[1:])
    return start, stop


def pieces(text: str) -> list[str]:
    """Cut a long text at line ends into parts of about `CHUNK` characters that join to it."""
    parts = []
    start = 0
    while len(text) - start > CHUNK:
        end = text.rfind("\n", start + CHUNK // 2, start + CHUNK) + 1 or start + CHUNK
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


class DocumentEncoder:
    """Turns documents into stored ids; built once per tokenizer and options."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: EncodeOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.start = document_start_ids(tokenizer)
        self.end = document_end_id(tokenizer)
        self.markers = fim_markers(tokenizer) if options.fim_rate > 0 else ([], [], [])

    def encode(self, documents: Sequence[Document]) -> Iterator[NDArray[np.uint32]]:
        """Yield the ids of each document, end included, with `CONTEXT_BIT` on what is no target."""
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
        """Return start, head, text and end; or with the fill-in-the-middle markers between the
        parts.

        The head is context: in use it is given, never to be written.
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
        """Return a conversation; only the assistant's tokens are targets."""
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
    """Return `count` texts of `length` token ids, `[R, T]`, drawn by `seed` and the documents'
    names.

    Each is the start of a document of at least that length while there are such; then shorter ones
    are joined. Raises `DataError` if all the text is not enough.
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
        texts = [*texts, joined[:length]]
        joined = joined[length:]
    if len(texts) < count:
        raise DataError(
            f"The text gives {len(texts)} pieces of {length} tokens, {count} are needed; add text or ask for less."
        )
    return torch.tensor(texts)
