"""Encode documents as token ids, with path header, fill-in-the-middle and conversation mask; cut
texts of equal length.
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
from deepseek.text.infilling import infill_layout
from deepseek.text.tokenizer import (
    document_end_id,
    document_start_ids,
    encode_continued,
    encode_plain,
)

CONTEXT_BIT = np.uint32(1 << 31)
"""Bit set on stored ids that are context, not targets; every vocabulary is far below 2**31."""

CHUNK = 1 << 16
"""Characters per call of the tokenizer. Longer texts are cut at line ends, so that all cores work
and memory stays small.
"""


@dataclass(frozen=True)
class EncodeOptions:
    """Options that determine a document's ids, beside the tokenizer.

    Attributes:
        header: whether to put `file: <name>` before code and `commit: <name>` before commits, as
            context, so that the model can use the path; default: True.
    """

    header: bool = True


def header(document: Document) -> str:
    """Return the header line with the name of a file or commit."""
    return f"{'commit' if document.kind == 'commit' else 'file'}: {document.name}\n\n"


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
        self.layout = infill_layout(tokenizer)

    def encode(self, documents: Sequence[Document]) -> Iterator[NDArray[np.uint32]]:
        """Yield the ids of each document with its end token, and `CONTEXT_BIT` on non-targets."""
        sections = [[pieces(text) for text in self.sections(document)] for document in documents]
        flat: list[str] = []
        begins: list[bool] = []  # whether each piece begins a text instead of continuing one
        for document, parts in zip(documents, sections, strict=True):
            # The texts around a gap are encoded one by one, as `encode_around_gap` does for the
            # server: without tokens for it, a marker that is spelled as text begins the document.
            has_gap = document.kind == "infill"
            is_begun = has_gap and not self.layout.has_tokens
            for part in parts:
                begins += [not is_begun] + [False] * (len(part) - 1)
                flat += part
                is_begun = is_begun or has_gap or part != [""]
        encoded = iter(self._encode_pieces(flat, begins))
        for document, parts in zip(documents, sections, strict=True):
            ids = [[identity for _ in part for identity in next(encoded)] for part in parts]
            if document.kind == "messages":
                yield self.messages(document)
            else:
                yield self.infill(*ids) if document.kind == "infill" else self.join(*ids)

    def _encode_pieces(self, texts: Sequence[str], begins: Sequence[bool]) -> list[list[int]]:
        """Return the ids of pieces of texts.

        Args:
            texts: the pieces.
            begins: whether each one begins a text instead of continuing one.
        """
        pairs = list(zip(texts, begins, strict=True))
        first = iter(encode_plain(self.tokenizer, [text for text, begin in pairs if begin]))
        others = iter(
            encode_continued(self.tokenizer, [text for text, begin in pairs if not begin])
        )
        return [next(first) if begin else next(others) for begin in begins]

    def sections(self, document: Document) -> list[str]:
        """Return the texts to encode: none, [head, text], or [prefix, suffix, middle]; the prefix
        includes the middle if that follows it directly.
        """
        if document.kind == "messages":
            return []
        if document.kind == "infill":
            prefix, suffix, middle = document.gap()
            # A middle right after the prefix is tokenised with it, like by token healing.
            follows = not self.layout.has_tokens
            return [prefix + middle, suffix, ""] if follows else [prefix, suffix, middle]
        head = header(document) if self.options.header and document.kind != "text" else ""
        return [head, document.text]

    def join(self, head: list[int], text: list[int]) -> NDArray[np.uint32]:
        """Return start, header, text and end tokens.

        The header is context, since at inference it is always part of the prompt.
        """
        ids = np.array([*self.start, *head, *text, self.end], dtype=np.uint32)
        ids[: len(self.start) + len(head)] |= CONTEXT_BIT
        return ids

    def infill(self, prefix: list[int], suffix: list[int], middle: list[int]) -> NDArray[np.uint32]:
        """Return a text with a gap, and what fills it at the end (see `text/infilling.py`).

        Markers are context. There is no header, since editors name no file.
        """
        before = self.layout.join(prefix, suffix)
        ids = np.array([*self.start, *before, *middle, self.end], dtype=np.uint32)
        is_marker = self.layout.is_marker(prefix, suffix)
        ids[: len(self.start)] |= CONTEXT_BIT
        ids[len(self.start) : len(self.start) + len(before)][is_marker] |= CONTEXT_BIT
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
