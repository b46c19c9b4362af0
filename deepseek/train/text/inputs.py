"""Digests of what a run reads, so that a run folder is only resumed on the same inputs."""

import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from deepseek.checkpoint.files import existing_path, readable_file
from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import file_digest
from deepseek.data.preferences.database import PreferenceDatabase
from deepseek.data.text.filters import Skipped, largest_size
from deepseek.data.text.git import find_commit, open_repository, repository_name
from deepseek.data.text.source import walk
from deepseek.errors import DataError
from deepseek.train.text.corpus import Source


def base_digest(base: str | Path) -> str:
    """Return a SHA-256 of a model's weights and tokenizer.

    Args:
        base: a known name, a folder or a hub id.
    """
    digests = fingerprint(resolve(base))
    return sha256(f"{digests.weights} {digests.tokenizer}".encode()).hexdigest()


def text_digest(source: Source, without: Sequence[Path] = ()) -> str:
    """Return a SHA-256 of the content of a text source: the bytes of all files that would be read.

    Of a git repository only the name counts. People commit while a run goes on; the run keeps to
    the commits that its corpus was built from.

    Args:
        source: the text.
        without: files and folders that the run itself writes, which may lie within the text.

    Raises:
        DataError: a part of the source does not exist or cannot be read.
    """
    digest = sha256()
    if source.git:
        repository = open_repository(source.git)
        find_commit(repository, "HEAD")
        digest.update(f"git {repository_name(repository)}\n".encode(errors="replace"))
    if source.folder:
        _add_folder(digest, source.folder, [made.resolve() for made in without])
    for file in filter(None, (source.jsonl, source.parquet)):
        content = file_digest(readable_file(file, "one JSONL or Parquet file"))
        digest.update(f"{file.name} {content}\n".encode(errors="replace"))
    return digest.hexdigest()


def preferences_digest(database: Path) -> str:
    """Return a SHA-256 of the pairs in a preference database, with their split.

    Raises:
        DataError: the file does not exist, or is not a preference database.
    """
    if not database.is_file():
        raise DataError(f"{database} does not exist; `deepseek prefs import FILE` makes one.")
    digest = sha256()
    store = PreferenceDatabase(database)
    try:
        for pair in store.pairs("train"):
            digest.update(f"train {pair.digest}\n".encode())
        for pair in store.pairs("eval"):
            digest.update(f"eval {pair.digest}\n".encode())
    finally:
        store.close()
    return digest.hexdigest()


def _add_folder(digest: Any, root: Path, without: Sequence[Path]) -> None:
    """Add path and content of every text file below `root` to a digest."""
    for file in [existing_path(root)] if root.is_file() else walk(existing_path(root), Skipped()):
        if any(_belongs(file, made) for made in without):
            continue
        try:
            regular = file.is_file() and file.stat().st_size <= largest_size(file.name)
            content = file_digest(file) if regular else ""
        except OSError:
            content = ""
        digest.update(f"{os.fspath(file.relative_to(root))} {content}\n".encode(errors="replace"))


def _belongs(file: Path, made: Path) -> bool:
    """Return whether a file is `made`, lies below it, or is a lock or temporary file beside it."""
    beside = file.parent == made.parent and file.name.startswith(f".{made.name}.")
    return beside or file == made or made in file.parents
