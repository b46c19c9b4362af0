"""Retrieval index of an expert's training text, stored beside its pack."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from hashlib import sha256
from operator import or_
from pathlib import Path, PurePosixPath

from transformers import PreTrainedTokenizerFast

from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import read_object
from deepseek.data import Document, TokenShards
from deepseek.data.text.decode import decode_documents
from deepseek.errors import DataError
from deepseek.packs.library import index_folder
from deepseek.retrieval.index import Index
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.jobs.pack_place import pack_of
from deepseek.train.loop.past_runs import find_run, finished_runs, latest_run
from deepseek.train.loop.run_lock import run_lock
from deepseek.train.text.corpus import known_documents, whole_text

FORMAT = "6"
"""Format version; increase it when the same text is indexed differently."""


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
    return _index_folder(request["name"], run)


def expert_index(name: str, run: Path, tokenizer: PreTrainedTokenizerFast) -> Index:
    """Return the index of an expert's training text, building it if missing or outdated.

    The index never contains held-out documents, nor commits that changed a held-out file.
    """
    folder = _index_folder(name, run)
    source = index_source(run)
    with suppress(DataError):  # missing, damaged or of another version: it is built below
        index = Index.load(folder)
        if index.source == source:
            return index
    with run_lock(folder):
        index = Index.build(
            learnt_documents(run, tokenizer), held_out_names(run, tokenizer), source
        )
        index.save(folder)
    return index


def _index_folder(name: str, run: Path) -> Path:
    """Return the path of an expert's index: beside the pack that its run wrote, which need not be
    in the folder of trained experts.

    Args:
        name: name of the expert.
        run: its run folder.
    """
    pack = pack_of(run)
    return index_folder(name, pack.parent if pack is not None and pack.is_file() else None)


def index_source(run: Path) -> str:
    """Return a digest of the text that a run's index covers: its training and its updates.

    It includes `FORMAT`, so that indexes of earlier versions are rebuilt.
    """
    texts = [whole_text(finished / "corpus").digest for finished in finished_runs(run)]
    return sha256(" ".join([FORMAT, *texts]).encode()).hexdigest()


def learnt_documents(run: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[Document]:
    """Yield the training documents of a run and its updates, each once; a changed file comes in its
    latest version.

    Deleted files are left out, and renamed files have their new name, since users look up in the
    source what retrieval cites.
    """
    known = set()
    unnamed = 0
    runs = finished_runs(run)
    files = _Files(runs) if len(runs) > 1 else None
    for finished in reversed(runs):
        for stored in decode_documents(whole_text(finished / "corpus"), tokenizer):
            document = files.current(stored) if files else stored
            if document is None:
                continue
            is_unnamed = document.kind == "text"
            key = document.text if is_unnamed else document.name
            if key in known:
                continue
            known.add(key)
            unnamed += is_unnamed
            yield replace(document, name=f"text {unnamed}") if is_unnamed else document


class _Files:
    """The files in the source of an expert at its last update.

    Args:
        runs: folders of the training and of its finished updates.
    """

    def __init__(self, runs: Sequence[Path]) -> None:
        *earlier, self.latest = (known_documents(run / "corpus") for run in runs)
        before = reduce(or_, earlier)
        self.learnt_before = before.learnt
        self.new_names = sorted(self.latest.train_names - before.train_names)
        source = read_object(runs[0] / "request.json").get("source", {})
        # Shards don't store names of prose, so records can't be told from files.
        self.has_records = any(source.get(kind) for kind in ("jsonl", "parquet"))

    def current(self, document: Document) -> Document | None:
        """Return a training document under the current name of its file; None: the file is gone.

        Documents that are not files (commits, conversations, records) are returned unchanged.
        """
        if document.kind == "code":
            # Earlier versions did not record the names.
            is_named = not self.latest.train_names or document.name in self.latest.train_names
            return document if is_named else self._renamed(document)
        if document.kind == "text" and not self.has_records and self.latest.learnt:
            digest = document.text_digest
            is_gone = digest in self.learnt_before and digest not in self.latest.learnt
            return None if is_gone else document
        return document

    def _renamed(self, document: Document) -> Document | None:
        """Return a document under the new name of its file; None: the file is gone."""
        if document.text_digest not in self.latest.learnt:
            return None
        file = PurePosixPath(document.name).name
        # Most files are moved to another folder, so these names come first.
        for name in sorted(self.new_names, key=lambda name: PurePosixPath(name).name != file):
            renamed = replace(document, name=name)
            if renamed.digest in self.latest.train:
                return renamed
        return None


def held_out_names(run: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the names of the documents that a run, or its last update, held out."""
    corpus = latest_run(run) / "corpus"
    names = read_object(corpus / "corpus.json").get("held_out_names")
    if isinstance(names, list):
        return [str(name) for name in names]
    # Earlier versions did not record them, and shards store names of code only.
    held_out = decode_documents(TokenShards(corpus / "held-out"), tokenizer)
    return [document.name for document in held_out if document.kind != "text"]
