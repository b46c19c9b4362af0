"""Where the texts to evaluate on come from."""

import pydoc_data.topics
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from deepseek.checkpoint.store import home
from deepseek.data import Document, TokenShards, clean, read_folder, read_records
from deepseek.data.encode import CONTEXT_BIT
from deepseek.errors import DataError
from deepseek.evaluate.quality import HeldOutText


def held_out_folder(expert: str) -> Path:
    """Return the folder of the text that the run of a trained expert held out."""
    return home() / "runs" / expert / "corpus" / "held-out"


def expert_texts(names: Sequence[str], plugged: Sequence[str]) -> list[HeldOutText]:
    """Return the held-out text of each trained expert whose run is still there."""
    return [
        HeldOutText(name, TokenShards(held_out_folder(name)), name if name in plugged else None)
        for name in names
        if held_out_folder(name).is_dir()
    ]


def held_out_opening(expert: str, tokens: int) -> list[int]:
    """Return the ids that open the first held-out document of an expert that is at least twice as long."""
    shards = TokenShards(held_out_folder(expert))
    lengths = shards.offsets[1:] - shards.offsets[:-1]
    first = next((d for d, length in enumerate(lengths.tolist()) if length >= 2 * tokens), int(lengths.argmax()))
    opening = shards.ids_N[shards.offsets[first] : shards.offsets[first + 1]][:tokens]
    ids: list[int] = (opening & ~CONTEXT_BIT).tolist()
    return ids


def public_documents() -> dict[str, list[Document]]:
    """Return ordinary English prose and ordinary code that are on every machine: Python's own pages and library."""
    topics = pydoc_data.topics.topics
    prose = [Document(text, f"topics/{name}") for name, text in sorted(topics.items()) if len(text) > 2000]
    library = Path(sysconfig.get_path("stdlib"))
    code = [
        Document(path.read_text(encoding="utf-8", errors="replace"), path.name, "code")
        for path in sorted(library.glob("*.py"))
    ]
    return {"public prose": prose, "public code": code}


def documents_at(paths: Sequence[Path]) -> list[Document]:
    """Return the cleaned documents at `paths`, or where there are none those that every machine has."""
    if not paths:
        return [document for documents in public_documents().values() for document in documents]
    return [document for path in paths for document in _read(path)]


@contextmanager
def collected(
    tokenizer: PreTrainedTokenizerFast, paths: Sequence[Path], experts: list[HeldOutText]
) -> Iterator[list[HeldOutText]]:
    """Give the experts' texts, the public ones and those at `paths`, tokenised in a folder that is then deleted."""
    sources = {str(path): list(_read(path)) for path in paths} | public_documents()
    with tempfile.TemporaryDirectory(prefix="deepseek-eval-") as folder:
        built = [
            HeldOutText(name, TokenShards.build(documents, tokenizer, Path(folder) / str(number)))
            for number, (name, documents) in enumerate(sources.items())
        ]
        yield experts + built


def _read(path: Path) -> Iterator[Document]:
    if path.is_file() and path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path} is neither a folder nor a .jsonl or .parquet file; put text files into a folder.")
    yield from clean(read_folder(path) if path.is_dir() else read_records(path))[0]
