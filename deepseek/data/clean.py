"""Cleaning: secrets redacted, duplicates dropped, and a count of everything that was done."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from deepseek.data.document import Document, Progress
from deepseek.data.duplicates import near_duplicates
from deepseek.data.filters import Skipped
from deepseek.data.secrets import redact_document
from deepseek.errors import DataError


@dataclass
class CleanReport:
    """What cleaning found.

    Attributes:
        read: documents that came in.
        kept: documents that came out.
        characters: their length.
        exact_duplicates, near_duplicates: documents dropped for an earlier one.
        redacted: secrets replaced, by kind.
        skipped: files the reader left out, by reason.
    """

    read: int = 0
    kept: int = 0
    characters: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    redacted: Counter[str] = field(default_factory=Counter)
    skipped: Skipped = field(default_factory=Counter)

    def __str__(self) -> str:
        """Return one line for a terminal."""
        parts = [f"{self.kept} documents ({self.characters / 1e6:.1f} MB) of {self.read} read"]
        parts += [f"{count} {what}" for what, count in self.counts().items() if count]
        return ", ".join(parts)

    def counts(self) -> dict[str, int]:
        """Return what was dropped or changed, by reason."""
        dropped = {"exact duplicates": self.exact_duplicates, "near duplicates": self.near_duplicates}
        secrets = {f"{kind} redacted": count for kind, count in self.redacted.most_common()}
        files = {f"skipped as {reason}": count for reason, count in self.skipped.most_common()}
        return {**dropped, **secrets, **files}


def clean(
    documents: Iterable[Document], skipped: Skipped | None = None, progress: Progress | None = None
) -> tuple[list[Document], CleanReport]:
    """Return the documents worth training on, in order, and a report.

    Of equal or nearly equal documents the first is kept. `skipped` is the counter given to the reader, filled while
    it is read here. Raises `DataError` if nothing is left.
    """
    report = CleanReport(skipped=skipped if skipped is not None else Counter())
    seen: set[int] = set()
    kept: list[Document] = []
    for original in documents:
        report.read += 1
        document, found = redact_document(original)
        report.redacted.update(found)
        if progress and report.read % 100 == 0:
            progress(report.read, 0, "clean")
        if not document.text.strip():
            report.skipped["empty"] += 1
            continue
        key = hash((document.text.strip(), document.kind == "messages"))
        if key in seen:
            report.exact_duplicates += 1
            continue
        seen.add(key)
        kept.append(document)
    drop = near_duplicates([document.text for document in kept], progress)
    result = [document for index, document in enumerate(kept) if index not in drop]
    report.near_duplicates = len(drop)
    report.kept, report.characters = len(result), sum(len(document.text) for document in result)
    if not result:
        raise DataError(f"Nothing is left of {report.read} documents after cleaning; check the source.")
    return result, report
