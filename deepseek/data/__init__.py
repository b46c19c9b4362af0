"""From sources of text to batches: read, clean, split, tokenise once, load rows."""

from deepseek.data.clean import CleanReport, clean
from deepseek.data.document import Document, Progress
from deepseek.data.encode import EncodeOptions
from deepseek.data.git import read_git, read_git_by_time
from deepseek.data.loader import Batch, RowLoader
from deepseek.data.shards import TokenShards
from deepseek.data.source import read_folder, read_jsonl, read_parquet
from deepseek.data.split import split

__all__ = [
    "Batch",
    "CleanReport",
    "Document",
    "EncodeOptions",
    "Progress",
    "RowLoader",
    "TokenShards",
    "clean",
    "read_folder",
    "read_git",
    "read_git_by_time",
    "read_jsonl",
    "read_parquet",
    "split",
]
