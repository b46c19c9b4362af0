"""Cleaning: secrets redacted, duplicates dropped, and a count of everything that was done."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from deepseek.data.document import Document, Progress, silent
from deepseek.data.duplicates import near_duplicates
from deepseek.data.filters import Skipped
from deepseek.data.secrets import redact_document
from deepseek.errors import DataError


@dataclass
class CleanReport:
    """What cleaning found.

    Attributes:
        read, kept: documents that came in and out.
        characters: length of those kept.
        changes: how much was dropped, redacted or left unread by the reader, by reason.
    """

    read: int = 0
    kept: int = 0
    characters: int = 0
    changes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Return one line for a terminal."""
        parts = [f"{self.kept} documents ({self.characters / 1e6:.1f} MB) of {self.read} read"]
        return ", ".join([*parts, *(f"{count} {what}" for what, count in self.changes.most_common())])


def clean(
    documents: Iterable[Document], skipped: Skipped | None = None, progress: Progress = silent
) -> tuple[list[Document], CleanReport]:
    """Return the documents worth training on, in order, and a report.

    Of equal or nearly equal documents the first is kept. `skipped` is the counter given to the reader, filled while
    it is read here. Raises `DataError` if nothing is left.
    """
    report, skipped = CleanReport(), skipped if skipped is not None else Counter()
    seen: set[int] = set()
    kept: list[Document] = []
    for original in documents:
        report.read += 1
        document, found = redact_document(original)
        report.changes.update({f"{kind} redacted": count for kind, count in found.items()})
        if report.read % 100 == 0:
            progress(report.read, 0, "clean")
        if not document.text.strip():
            skipped["empty"] += 1
            continue
        key = hash((document.text.strip(), document.kind == "messages"))
        if key in seen:
            report.changes["exact duplicates"] += 1
            continue
        seen.add(key)
        kept.append(document)
    drop = near_duplicates([document.text for document in kept], progress)
    result = [document for index, document in enumerate(kept) if index not in drop]
    report.changes.update({"near duplicates": len(drop)} if drop else {})
    report.changes.update({f"skipped as {reason}": count for reason, count in skipped.items()})
    report.kept, report.characters = len(result), sum(len(document.text) for document in result)
    if not result:
        raise DataError(f"Nothing is left of {report.read} documents after cleaning; check the source.")
    return result, report
