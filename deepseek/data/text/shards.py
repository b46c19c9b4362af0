"""Token shards: documents tokenised once into memory-mapped files.

A folder holds `tokens.bin` (uint32 ids, with `CONTEXT_BIT` on non-targets), `offsets.bin` (uint64
start of each document, and the end) and `meta.json` (digests of the source and of both files).
"""

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from deepseek.checkpoint.store import atomic_folder, read_json, write_json
from deepseek.data.text.document import Document, Progress, silent
from deepseek.data.text.encode import DocumentEncoder, EncodeOptions
from deepseek.errors import CheckpointError, DataError
from deepseek.text.tokenizer import puts_space_before, tokenizer_digest

FORMAT = 1
META = {"digest": str, "source": str, "tokens": int, "documents": int}
"""Fields of `meta.json` and their types."""

BATCH_CHARACTERS = 1 << 21
"""Characters tokenised between two writes, which bounds memory for any size of corpus."""


class TokenShards:
    """Memory-mapped token ids of a corpus.

    Args:
        folder: a folder written by `build`.

    Attributes:
        ids_N: uint32 `[N]`, ids of all documents in sequence.
        offsets: uint64 `[num_documents + 1]`, document d is `ids_N[offsets[d]:offsets[d + 1]]`.
        digest: SHA-256 of ids and offsets, referenced by trunk caches and expert packs.
        source: SHA-256 of documents, tokenizer and options; a rebuild is needed if it changes.

    Raises:
        DataError: the folder is missing, incomplete or of another format version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            meta = read_json(self.folder / "meta.json")
        except CheckpointError as error:
            raise DataError(
                f"{folder} holds no token shards; build them from documents first."
            ) from error
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise DataError(
                f"The token shards in {folder} are of another version; "
                "delete the folder to rebuild them."
            )
        if not all(isinstance(meta.get(name), kind) for name, kind in META.items()):
            raise DataError(
                f"The notes of the token shards in {folder} are damaged; delete the folder to "
                "rebuild them."
            )
        self.digest: str = meta["digest"]
        self.source: str = meta["source"]
        self.ids_N = map_file(self.folder / "tokens.bin", np.uint32, meta["tokens"])
        self.offsets = map_file(self.folder / "offsets.bin", np.uint64, meta["documents"] + 1)

    @property
    def num_tokens(self) -> int:
        """Number of ids, including document ends."""
        return len(self.ids_N)

    def is_intact(self) -> bool:
        """Return whether the files still match their digest; reads them once."""
        return content_digest(self.folder) == self.digest

    @classmethod
    def build(
        cls,
        documents: Collection[Document],
        tokenizer: PreTrainedTokenizerFast,
        folder: str | Path,
        options: EncodeOptions | None = None,
        progress: Progress = silent,
    ) -> "TokenShards":
        """Tokenise documents into a folder, or open it if it is intact and of the same source.

        Args:
            documents: the documents.
            tokenizer: the model's tokenizer.
            folder: where to write.
            options: see `EncodeOptions`; default: `EncodeOptions()`.
            progress: called now and then; default: no progress.

        Raises:
            DataError: there are no documents, or `folder` holds other files.
        """
        options = options or EncodeOptions()
        if not documents:
            raise DataError(
                "There are no documents to tokenise; check the source and what it skipped."
            )
        source = source_digest(documents, tokenizer, options)
        existing_shards = open_existing(Path(folder))
        if (
            existing_shards is not None
            and existing_shards.source == source
            and existing_shards.is_intact()
        ):
            return existing_shards
        with atomic_folder(folder) as temporary:
            lengths = write_tokens(
                documents, DocumentEncoder(tokenizer, options), temporary, progress
            )
            offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.uint64)]).astype("<u8")
            offsets.tofile(temporary / "offsets.bin")
            meta = {"format": FORMAT, "source": source, "digest": content_digest(temporary)}
            write_json(
                temporary / "meta.json",
                {**meta, "documents": len(lengths), "tokens": int(offsets[-1])},
            )
        return cls(folder)


def open_existing(folder: Path) -> TokenShards | None:
    """Return the shards in `folder`, None if they are absent or unusable.

    Raises:
        DataError: the folder holds other files, which must not be replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / "meta.json").is_file() or not (folder / "tokens.bin").is_file():
        raise DataError(
            f"{folder} holds other files than token shards; choose an empty or new folder."
        )
    try:
        return TokenShards(folder)
    except DataError:
        return None


def write_tokens(
    documents: Collection[Document], encoder: DocumentEncoder, folder: Path, progress: Progress
) -> list[int]:
    """Write the ids of all documents to `tokens.bin`; return the number of ids of each document."""
    lengths: list[int] = []
    with open(folder / "tokens.bin", "wb") as file:
        for batch in batches(documents):
            for ids in encoder.encode(batch):
                file.write(ids.astype("<u4").tobytes())
                lengths.append(len(ids))
            progress(len(lengths), len(documents), "tokenise")
    return lengths


def batches(documents: Collection[Document]) -> Iterator[list[Document]]:
    """Yield groups of documents of about `BATCH_CHARACTERS` characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def source_digest(
    documents: Collection[Document], tokenizer: PreTrainedTokenizerFast, options: EncodeOptions
) -> str:
    """Return a SHA-256 of everything that determines the ids; a change triggers a rebuild."""
    digest = hashlib.sha256(
        json.dumps([FORMAT, tokenizer_digest(tokenizer), asdict(options)]).encode()
    )
    # Earlier versions let these tokenizers put spaces around gaps. All other data keeps its digest,
    # so that existing shards stay valid.
    kinds = {"infill": "infill without spaces"} if puts_space_before(tokenizer) else {}
    for document in documents:
        for field in (kinds.get(document.kind, document.kind), document.name, document.text):
            data = field.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def content_digest(folder: Path) -> str:
    """Return a SHA-256 of the files of ids and offsets."""
    digest = hashlib.sha256()
    for name in ("tokens.bin", "offsets.bin"):
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def map_file(
    path: Path, dtype: type[np.uint32] | type[np.uint64], length: int
) -> NDArray[np.unsignedinteger]:
    """Return a read-only view of a file of `length` numbers; raise `DataError` if its size
    differs.
    """
    expected_bytes = max(0, length) * np.dtype(dtype).itemsize
    if not path.is_file() or path.stat().st_size != expected_bytes:
        raise DataError(f"{path} is missing or cut short; delete {path.parent} to rebuild it.")
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", shape=(length,))
