"""Read folders, JSONL and Parquet files as documents; HTML pages and PDF files are reduced to
readable text.
"""

import gzip
import json
import math
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, time
from itertools import count
from pathlib import Path
from typing import Any

from deepseek.checkpoint.files import existing_path, readable_file
from deepseek.data.text.document import Document, conversation, document_name, not_empty
from deepseek.data.text.filters import (
    PDF_SUFFIX,
    Skipped,
    describe,
    file_document,
    folder_reason,
    largest_size,
    reason_by_path,
)
from deepseek.data.text.pages import html_to_text
from deepseek.data.text.pdf import pdf_to_text
from deepseek.data.text.pdf_pages import UnreadablePdfError
from deepseek.errors import DataError, shown
from deepseek.terminal import is_unicode, unicode_only, visible

LATEST = 10**15
"""Latest time of a record, in seconds since 1970; milliseconds fit too."""

PARQUET_ROWS = 128
"""Rows of a Parquet file that are held in memory."""

FIELDS = ("text", "messages", "prompt", "chosen", "time")
"""Fields of a record that becomes a document."""

LONGEST_LINE = 1 << 28
"""Lines of a record with at least this many bytes are refused."""

HTML_SUFFIXES = (".html", ".htm", ".xhtml")


def read_folder(path: str | Path, skipped: Skipped | None = None) -> Iterator[Document]:
    """Yield every text file under a folder (or one file), named `folder/path`: those of each folder
    by name, then those of its subfolders.

    Links to folders are not followed. HTML pages and PDF files are reduced to their readable text.

    Args:
        path: folder or file.
        skipped: counter, filled with the number of skipped files by reason; default: not reported.

    Raises:
        DataError: the path does not exist (raised at once), or holds no usable text (raised after
            reading).
    """
    root = existing_path(path)
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
    """Yield the files under `root` in sorted order, without entering folders that are vendored, or
    that this library writes.

    A folder that is not entered, or cannot be read, counts once in `skipped`. So does a link to a
    folder, which could be read twice or without end, and a link to a file outside `root`, or to one
    that would be skipped itself: a folder from somebody else could hold links to the user's private
    files.
    """
    resolved_root = root.resolve()

    def count_unreadable(_error: OSError) -> None:
        skipped["unreadable"] += 1

    for folder, folders, names in os.walk(root, onerror=count_unreadable):
        reasons = {name: _reason_not_entered(Path(folder, name)) for name in folders}
        skipped.update(filter(None, reasons.values()))
        folders[:] = sorted(name for name in folders if reasons[name] is None)
        for name in sorted(names):
            file = Path(folder, name)
            reason = reason_by_path(name)
            if reason is None and file.is_symlink():
                reason = _link_reason(file, resolved_root)
            if reason:
                skipped[reason] += 1
            else:
                yield file


def _reason_not_entered(folder: Path) -> str | None:
    """Return why a folder, or a link to one, is not entered, or None."""
    return folder_reason(folder) or ("link to a folder" if folder.is_symlink() else None)


def _link_reason(link: Path, root: Path) -> str | None:
    """Return why the file that a link leads to is skipped, or None.

    Args:
        link: the link.
        root: the folder that is read, without links in its path.
    """
    try:
        target = link.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return "unreadable"
    if not target.is_relative_to(root):
        return "link out of the folder"
    return reason_by_path(target.relative_to(root).as_posix())


def read_file(file: Path, relative_path: str, folder: str, skipped: Skipped) -> Document | None:
    """Return the document of one file, or None after counting in `skipped` why it is skipped.

    Args:
        file: path on disk.
        relative_path: its path below the folder, with slashes.
        folder: name of the folder.
        skipped: counter by reason.
    """
    try:
        status = file.stat()
        if not file.is_file() or status.st_size > largest_size(relative_path):
            skipped["too large" if file.is_file() else "not a file"] += 1
            return None
        data = file.read_bytes()
    except OSError:
        skipped["unreadable"] += 1
        return None
    name = document_name(f"{folder}/{relative_path}")
    time = int(status.st_mtime)
    if file.suffix.lower() == PDF_SUFFIX:
        return pdf_document(data, name, time, skipped)
    document = file_document(data, relative_path, name, time, skipped)
    if document and file.suffix.lower() in HTML_SUFFIXES:
        return replace(document, text=html_to_text(document.text))
    return document


def pdf_document(data: bytes, name: str, time: int, skipped: Skipped) -> Document | None:
    """Return the document of a PDF file, or None after counting in `skipped` why it is skipped.

    Args:
        data: content of the file.
        name: name of the document.
        time: creation time in seconds since 1970.
        skipped: counter by reason.
    """
    try:
        return Document(pdf_to_text(data), name, "text", time)
    except UnreadablePdfError as error:
        skipped[str(error)] += 1
        return None


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
    name = unicode_only(file.name)
    numbered = records(file, FIELDS)
    documents = (record_document(record, f"{name}:{number}") for number, record in numbered)
    complaint = (
        f"{file} is empty; write one JSON object per line, or row, with a `text` or `messages` "
        "field."
    )
    return not_empty(documents, lambda: complaint)


def records(file: Path, fields: Collection[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield number (from 1) and record of each non-blank line of a JSONL file, gzip-compressed if
    its name ends with `.gz`, or of each row of a `.parquet` file.

    Args:
        file: the file.
        fields: fields that the caller reads; of a Parquet file, the others are None.

    Raises:
        DataError: the file is missing, is a folder, pipe or device, or is not a valid JSONL or
            Parquet file.
    """
    file = readable_file(file, "one JSONL or Parquet file")
    if file.suffix.lower() in (".zst", ".bz2", ".xz"):
        raise DataError(f"{file} is compressed; unpack it first, with unzstd or the like.")
    if file.suffix.lower() == ".parquet":
        yield from enumerate(parquet_rows(file, fields), 1)
        return
    for number, line in enumerate(_lines(file), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} is not UTF-8 (line {number}); convert it with iconv -t utf-8."
            ) from error
        if text.strip():
            yield number, parse(text, f"{file.name} line {number}")


def _lines(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file, which is decompressed if its name ends with `.gz`.

    Raises:
        DataError: it cannot be decompressed, or a line has `LONGEST_LINE` bytes or more, as one of
            a small compressed file can have.
    """
    is_compressed = file.suffix.lower() == ".gz"
    with gzip.open(file) if is_compressed else open(file, "rb") as stream:
        for number in count(1):
            try:
                line = stream.readline(LONGEST_LINE)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{file} is damaged ({error}); fetch it again.") from None
            if not line:
                return
            if len(line) == LONGEST_LINE:
                raise DataError(
                    f"{file} line {number} has {LONGEST_LINE >> 20} MiB or more; write one record "
                    "per line."
                )
            yield line


def parse(line: str, location: str) -> Mapping[str, Any]:
    """Return the object on one JSONL line; `location` names file and line in errors.

    Raises:
        DataError: the line is not a JSON object.
    """
    try:
        record = json.loads(line)
    except RecursionError:
        raise DataError(
            f"{location} is nested too deeply; write one flat object per line."
        ) from None
    except ValueError as error:
        raise DataError(f"{location} is not JSON ({error}); write one object per line.") from error
    if not isinstance(record, dict):
        raise DataError(
            f'{location} is a {type(record).__name__}, not an object; wrap it as {{"text": ...}}.'
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
    file, _, number = name.rpartition(":")
    location = f"{file} line {number}"
    seconds = record_time(record.get("time", 0), location)
    if isinstance(record.get("text"), str):
        document = Document(record["text"], name, "text", seconds)
    elif isinstance(record.get("messages"), list):
        document = conversation(record["messages"], location, name, seconds)
    elif "prompt" in record and "chosen" in record:
        messages = preferred(record["prompt"], record["chosen"], location)
        document = conversation(messages, location, name, seconds)
    elif "text" in record:
        raise DataError(f"{location}: `text` is {shown(record['text'])}, no text; correct it.")
    else:
        raise DataError(
            f"{location} has no `text`, `messages` or `prompt` with `chosen` but "
            f"{field_names(record)}; rename its fields."
        )
    if not is_unicode(document.text):
        raise DataError(
            f"{location} is no Unicode text (it holds half of a surrogate pair); write it as UTF-8."
        )
    return document


def field_names(record: Mapping[str, Any]) -> str:
    """Return the names of a record's fields for a message."""
    return visible(", ".join(sorted(record))[:200]) or "nothing"


def record_time(value: object, location: str) -> int:
    """Return a record's time in whole seconds since 1970; 0 if it is neither a number nor a date.

    Args:
        value: seconds, a date, or a date in ISO 8601.
        location: file and line, named in errors.

    Raises:
        DataError: it is infinite, NaN or beyond `LATEST`.
    """
    if isinstance(value, str):
        value = _iso_date(value)
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if isinstance(value, datetime):
        # UTC if it has no zone, so that it means the same on every machine.
        zoned = value if value.tzinfo else value.replace(tzinfo=UTC)
        return int(zoned.timestamp())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    if not -LATEST <= value <= LATEST or math.isnan(value):
        raise DataError(
            f"{location}: `time` must be seconds since 1970, not {shown(value)}; correct it or "
            "leave it out."
        )
    return int(value)


def _iso_date(text: str) -> datetime | None:
    """Return the date that a text states in ISO 8601, None if it states none."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def preferred(prompt: object, chosen: object, location: str) -> list[Any]:
    """Return the conversation with the chosen answer.

    Args:
        prompt: a text or a list of messages.
        chosen: a text or a list of messages, which may repeat the prompt.
        location: file and line, named in errors.

    Raises:
        DataError: the messages are nested too deeply to be compared.
    """
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = chosen if isinstance(chosen, list) else [{"role": "assistant", "content": chosen}]
    try:
        return after if after[: len(before)] == before else [*before, *after]
    except RecursionError:
        raise DataError(f"{location} is nested too deeply; write messages as texts.") from None


def parquet_rows(file: Path, fields: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Parquet file.

    Only columns that the caller reads are decoded: others, such as images, can be large, or hold
    values that Python cannot.

    Args:
        file: the file.
        fields: names of these columns; the others are None.

    Raises:
        DataError: the file is damaged, or holds values that Python cannot hold; the message names
            the row.
    """
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(file) as table:
            unread = dict.fromkeys(name for name in table.schema_arrow.names if name not in fields)
            columns = [name for name in table.schema_arrow.names if name in fields]
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    yield unread | record
                    row += 1
    except Exception as error:  # damaged files and odd columns raise errors of many libraries
        raise DataError(
            f"{file} cannot be read as Parquet after row {row} ({error}); export it again."
        ) from error
