"""Read folders, JSONL and Parquet files as documents; HTML pages are reduced to readable text."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from deepseek.data.text.document import Document, conversation, not_empty
from deepseek.data.text.filters import (
    MAX_FILE_BYTES,
    Skipped,
    describe,
    file_document,
    reason_by_path,
    words,
)
from deepseek.errors import DataError

SILENT = words(
    "script style head nav header footer aside noscript template svg math button select form iframe"
)
"""HTML elements to skip: not readable text, or navigation, which repeats on every page."""

BREAKS = words(
    "p div section article main h1 h2 h3 h4 h5 h6 li dt dd tr table ul ol dl br hr blockquote figure pre"
)
"""HTML elements that begin and end a line."""


def html_to_text(page: str) -> str:
    """Return the text of an HTML page: one line per paragraph, list item or table row, with
    preformatted text unchanged.
    """
    reader = PageReader()
    reader.feed(page)
    reader.close()
    lines = "".join(reader.parts).split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip() + "\n"


class PageReader(HTMLParser):
    """Collects the text outside the elements in `SILENT`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent: list[str] = []
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter an element."""
        if tag == "body":
            self.silent.clear()  # the end tag of <head> is optional
        elif tag in SILENT:
            self.silent.append(tag)
        elif tag == "pre":
            self.preformatted += 1
        self.begin(tag)

    def begin(self, tag: str) -> None:
        """Start a new line, list item or table cell if the element has one."""
        if tag in BREAKS:
            self.parts.append("\n")
        if tag == "li":
            self.parts.append("- ")
        elif tag in ("td", "th"):
            self.parts.append("  ")

    def handle_endtag(self, tag: str) -> None:
        """Leave an element; ignore end tags without a start tag."""
        if tag in self.silent:
            del self.silent[self.silent.index(tag) :]
        elif tag == "pre":
            self.preformatted = max(0, self.preformatted - 1)
        if tag in BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Collect readable text; outside <pre>, collapse white space into single spaces."""
        if self.silent:
            return
        if self.preformatted:
            self.parts.append(data)
            return
        at_line_start = not self.parts or self.parts[-1].endswith("\n")
        text = re.sub(r"\s+", " ", data)
        self.parts.append(text.lstrip() if at_line_start else text)


HTML_SUFFIXES = (".html", ".htm", ".xhtml")


def read_folder(path: str | Path, skipped: Skipped | None = None) -> Iterator[Document]:
    """Yield every text file under a folder (or one file), sorted by path, named `folder/path`.

    Links to folders are not followed. HTML pages are reduced to their readable text.

    Args:
        path: folder or file.
        skipped: counter, filled with the number of skipped files by reason; default: not reported.

    Raises:
        DataError: the path does not exist (raised at once), or holds no usable text (raised after
            reading).
    """
    root = Path(path)
    if not root.exists():
        raise DataError(f"{root} does not exist; check the path.")
    counts = skipped if skipped is not None else Skipped()
    documents = folder_documents(root.resolve(), counts)
    return not_empty(
        documents,
        lambda: f"{root} holds no usable text files ({describe(counts)}); choose another folder.",
    )


def folder_documents(root: Path, skipped: Skipped) -> Iterator[Document]:
    """Yield the documents of a folder or of one file; count skipped files in `skipped`."""
    base = root.parent if root.is_file() else root
    for file in [root] if root.is_file() else walk(root, skipped):
        document = read_file(file, file.relative_to(base).as_posix(), base.name, skipped)
        if document:
            yield document


def walk(root: Path, skipped: Skipped) -> Iterator[Path]:
    """Yield the files under `root` in sorted order, without entering vendored folders."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not reason_by_path(f"{name}/x"))
        for name in sorted(names):
            reason = reason_by_path(name)
            if reason:
                skipped[reason] += 1
            else:
                yield Path(folder, name)


def read_file(file: Path, relative: str, folder: str, skipped: Skipped) -> Document | None:
    """Return the document of one file, or None after counting in `skipped` why it is skipped.

    Args:
        file: path on disk.
        relative: its path below the folder, with slashes.
        folder: name of the folder.
        skipped: counter by reason.
    """
    try:
        status = file.stat()
        if not file.is_file() or status.st_size > MAX_FILE_BYTES:
            skipped["too large" if file.is_file() else "not a file"] += 1
            return None
        data = file.read_bytes()
    except OSError:
        skipped["unreadable"] += 1
        return None
    document = file_document(data, relative, f"{folder}/{relative}", int(status.st_mtime), skipped)
    if document and file.suffix.lower() in HTML_SUFFIXES:
        return replace(document, text=html_to_text(document.text))
    return document


def read_records(path: str | Path) -> Iterator[Document]:
    """Yield one document per line of a JSONL file or row of a `.parquet` file.

    A record holds `text`, `messages`, or `prompt` and `chosen` (the answer to learn).

    Args:
        path: the file.

    Raises:
        DataError: the file is missing or empty, or a record has other fields; the message names
            file and line.
    """
    file = Path(path)
    documents = (
        record_document(record, f"{file.name}:{number}") for number, record in records(file)
    )
    complaint = (
        f"{file} is empty; write one JSON object per line, or row, with a `text` or `messages` "
        "field."
    )
    return not_empty(documents, lambda: complaint)


def records(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield number (from 1) and record of each non-blank line of a JSONL file, or of each row of a
    `.parquet` file.

    Raises:
        DataError: the file is missing, or is not a valid JSONL or Parquet file.
    """
    if not file.is_file():
        raise DataError(f"{file} does not exist or is a folder; give one JSONL or Parquet file.")
    if file.suffix == ".parquet":
        yield from enumerate(parquet_rows(file), 1)
        return
    with open(file, encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, parse(line, f"{file.name} line {number}")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} is not UTF-8 (byte {error.start}); convert it with iconv -t utf-8."
            ) from error


def parse(line: str, where: str) -> Mapping[str, Any]:
    """Return the object on one JSONL line; `where` names file and line in errors.

    Raises:
        DataError: the line is not a JSON object.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); write one object per line.") from error
    if not isinstance(record, dict):
        raise DataError(
            f'{where} is a {type(record).__name__}, not an object; wrap it as {{"text": ...}}.'
        )
    return record


def record_document(record: Mapping[str, Any], name: str) -> Document:
    """Return the document of one record.

    Args:
        record: fields of a JSONL line or Parquet row.
        name: `file:line`, the document's name, also used in errors.

    Raises:
        DataError: the record has none of the supported fields.
    """
    where = name.replace(":", " line ", 1)
    time = record.get("time", 0)
    time = int(time) if isinstance(time, int | float) else 0
    if isinstance(record.get("text"), str):
        return Document(record["text"], name, "text", time)
    if isinstance(record.get("messages"), list):
        return conversation(record["messages"], where, name, time)
    if "prompt" in record and "chosen" in record:
        return conversation(preferred(record["prompt"], record["chosen"]), where, name, time)
    fields = ", ".join(sorted(record)) or "nothing"
    raise DataError(
        f"{where} has no `text`, `messages` or `prompt` with `chosen` but {fields}; "
        "rename its fields."
    )


def preferred(prompt: object, chosen: object) -> list[Any]:
    """Return the conversation with the chosen answer.

    Args:
        prompt: a text or a list of messages.
        chosen: a text or a list of messages, which may repeat the prompt.
    """
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = chosen if isinstance(chosen, list) else [{"role": "assistant", "content": chosen}]
    return after if after[: len(before)] == before else [*before, *after]


def parquet_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Parquet file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
    except (OSError, ArrowException) as error:
        raise DataError(f"{file} cannot be read as Parquet ({error}); export it again.") from error
    for batch in table.iter_batches(batch_size=1024):
        yield from batch.to_pylist()
