"""Training data: read text sources, clean, split, tokenise once into shards, load batches.

Names are imported at first use, so that the preference database needs no tokenizer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek.data.text.clean import CleanReport as CleanReport
    from deepseek.data.text.clean import clean as clean
    from deepseek.data.text.document import Document as Document
    from deepseek.data.text.document import Progress as Progress
    from deepseek.data.text.document import split as split
    from deepseek.data.text.encode import EncodeOptions as EncodeOptions
    from deepseek.data.text.git import read_git as read_git
    from deepseek.data.text.git import read_git_by_time as read_git_by_time
    from deepseek.data.text.loader import Batch as Batch
    from deepseek.data.text.loader import RowLoader as RowLoader
    from deepseek.data.text.shards import TokenShards as TokenShards
    from deepseek.data.text.source import read_folder as read_folder
    from deepseek.data.text.source import read_records as read_records

_HOMES = {
    "Batch": "loader",
    "CleanReport": "clean",
    "Document": "document",
    "EncodeOptions": "encode",
    "Progress": "document",
    "RowLoader": "loader",
    "TokenShards": "shards",
    "clean": "clean",
    "read_folder": "source",
    "read_git": "git",
    "read_git_by_time": "git",
    "read_records": "source",
    "split": "document",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'deepseek.data' has no attribute {name!r}")
    value = getattr(import_module(f"deepseek.data.text.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
