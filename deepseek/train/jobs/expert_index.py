"""Retrieval index of an expert's training text, stored beside its pack."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import read_object
from deepseek.data import TokenShards
from deepseek.data.text.decode import decode_documents
from deepseek.errors import DataError
from deepseek.packs.library import index_folder
from deepseek.retrieval.index import Index
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.loop.past_runs import find_run
from deepseek.train.loop.run_lock import run_lock
from deepseek.train.text.corpus import whole_text


def index_expert(name: str) -> Path:
    """Return the folder of an expert's index, building it from its run folder if necessary.

    Raises:
        DataError: there is no such run, or it has no text.
    """
    run = find_run(name)
    path = run / "request.json"
    if not path.is_file():
        raise DataError(
            f"The run {run} has not read its text yet; resume `deepseek expert train` first."
        )
    request = read_object(path)
    if "name" not in request:
        raise DataError(f"The run {run} trains no expert; name a run of `deepseek expert train`.")
    expert_index(request["name"], run, load_tokenizer(resolve(request["base"])))
    return index_folder(request["name"])


def expert_index(name: str, run: Path, tokenizer: PreTrainedTokenizerFast) -> Index:
    """Return the index of an expert's training text, building it if missing or outdated.

    The index never contains held-out documents, nor commits that changed a held-out file.
    """
    shards = whole_text(run / "corpus")
    folder = index_folder(name)
    if (folder / "meta.json").is_file():
        index = Index.load(folder)
        if index.source == shards.digest:
            return index
    held_out = [
        document.name
        for document in decode_documents(TokenShards(run / "corpus" / "held-out"), tokenizer)
    ]
    with run_lock(folder):
        index = Index.build(
            decode_documents(shards, tokenizer), without=held_out, source=shards.digest
        )
        index.save(folder)
    return index
