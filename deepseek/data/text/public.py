"""Text for measurements and calibration: public text available on every machine, and the user's
text.
"""

import pydoc_data.topics
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepseek.data.text.clean import clean
from deepseek.data.text.document import Document
from deepseek.data.text.source import read_folder, read_records
from deepseek.errors import DataError


def public_documents() -> dict[str, list[Document]]:
    """Return public prose and code available on every machine: Python's help topics and standard
    library.
    """
    topics = pydoc_data.topics.topics
    prose = [
        Document(text, f"topics/{name}")
        for name, text in sorted(topics.items())
        if len(text) > 2000
    ]
    library = Path(sysconfig.get_path("stdlib"))
    code = [
        Document(path.read_text(encoding="utf-8", errors="replace"), path.name, "code")
        for path in sorted(library.glob("*.py"))
    ]
    return {"public prose": prose, "public code": code}


def documents_at(paths: Sequence[Path]) -> list[Document]:
    """Return the cleaned documents at `paths`; without paths, the public documents."""
    if not paths:
        return [document for documents in public_documents().values() for document in documents]
    return [document for path in paths for document in read_documents(path)]


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the cleaned documents of a folder, a JSONL file (also compressed by gzip), or a Parquet
    file.

    Raises:
        DataError: the path does not exist, is another file, or holds no usable text.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; name a folder, or a .jsonl or .parquet file.")
    if path.is_file() and not path.name.lower().endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise DataError(
            f"{path} is neither a folder nor a .jsonl, .jsonl.gz or .parquet file; "
            "put text files into a folder."
        )
    yield from clean(read_folder(path) if path.is_dir() else read_records(path))[0]
