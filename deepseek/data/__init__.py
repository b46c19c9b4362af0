"""Training data: read text sources, clean, split, tokenise once into shards, load batches."""

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
