"""From sources of text to batches: read, clean, split, tokenise once, load rows."""

from deepseek.data.clean import CleanReport as CleanReport
from deepseek.data.clean import clean as clean
from deepseek.data.document import Document as Document
from deepseek.data.document import Progress as Progress
from deepseek.data.document import split as split
from deepseek.data.encode import EncodeOptions as EncodeOptions
from deepseek.data.git import read_git as read_git
from deepseek.data.git import read_git_by_time as read_git_by_time
from deepseek.data.loader import Batch as Batch
from deepseek.data.loader import RowLoader as RowLoader
from deepseek.data.shards import TokenShards as TokenShards
from deepseek.data.source import read_folder as read_folder
from deepseek.data.source import read_records as read_records
