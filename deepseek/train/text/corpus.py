"""Build the token shards of a run, once per run folder: read, clean, split, tokenise."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from deepseek.checkpoint.files import located
from deepseek.checkpoint.store import read_object, write_json
from deepseek.data import (
    CleanReport,
    Document,
    Progress,
    TokenShards,
    clean,
    read_folder,
    read_git,
    read_records,
    split,
)
from deepseek.data.text.commits import FileSides, follow_files, renamed_files, with_later_names
from deepseek.data.text.document import KnownNames, Rule, draw_lots, silent
from deepseek.data.text.filters import Skipped
from deepseek.data.text.gaps import with_gaps
from deepseek.data.text.git import find_commit, open_repository, read_git_by_time
from deepseek.data.text.halves import halve
from deepseek.errors import DataError
from deepseek.train.text.question_mix import mix_questions
from deepseek.train.text.sides import keep_sides, keep_validation

FOLLOWS = "commits_follow_files"
"""Key of `Sides.follows` in `corpus.json`."""

WHOLE = "whole"
"""Folder of the training text without gaps, written if the run trains on text with gaps."""


@dataclass(frozen=True)
class Source:
    """Text sources of a run, and the rule for its held-out set.

    Attributes:
        git: path of a git repository.
        folder: path of a folder of text files.
        jsonl: path of a JSONL file.
        parquet: path of a Parquet file. At least one of the four paths is set.
        held_out: share of the documents to hold out.
        by: rule of the split: "file", "directory" or "time" (train on the past, test on later
            commits).
        seed: seed of the split.
        questions: share of questions about the documents in the training tokens; 0: none.
        infill: share of the code files to train on as texts with gaps; 0: none.
    """

    git: Path | None = None
    folder: Path | None = None
    jsonl: Path | None = None
    parquet: Path | None = None
    held_out: float = 0.1
    by: Rule = "file"
    seed: int = 0
    questions: float = 0.0
    infill: float = 0.0

    @classmethod
    def at(
        cls,
        *paths: str | Path | None,
        held_out: float,
        by: Rule = "file",
        seed: int,
        questions: float = 0.0,
    ) -> "Source":
        """Return the source of the four `paths`, in the order of the fields, made absolute."""
        git, folder, jsonl, parquet = (located(path) if path else None for path in paths)
        return cls(git, folder, jsonl, parquet, held_out, by, seed, questions)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values.

        An `infill` of 0 is left out, so that runs from before this field can be resumed.
        """
        values = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self).items()
        }
        if not self.infill:
            del values["infill"]
        return values


@dataclass(frozen=True)
class Corpus:
    """Token shards of one run.

    Attributes:
        train: training text.
        held_out: text for the report.
        validation: held-out text for choosing the best state; None if the run needs none.
        report: summary of the cleaning.
        commit: commit of the git repository; None for other sources.
    """

    train: TokenShards
    held_out: TokenShards
    validation: TokenShards | None
    report: str
    commit: str | None


@dataclass(frozen=True)
class KnownDocuments:
    """Digests (see `Document.digest`) and names of documents.

    Attributes:
        train: of training documents.
        held_out: of held-out documents, and of the halves of those that are cut in two.
        learnt: of the texts of training documents, whatever their names.
        tested: of the texts of held-out documents.
        validated: of the texts of held-out documents that, in whole or in part, chose a best state.
        train_names: names, not digests, of training documents and of their dropped duplicates.
        held_out_names: names of held-out documents and of their dropped duplicates.
    """

    train: frozenset[str]
    held_out: frozenset[str]
    learnt: frozenset[str] = frozenset()
    tested: frozenset[str] = frozenset()
    validated: frozenset[str] = frozenset()
    train_names: frozenset[str] = frozenset()
    held_out_names: frozenset[str] = frozenset()

    @property
    def names(self) -> KnownNames:
        """Names of the documents on both sides."""
        return KnownNames(self.train_names, self.held_out_names)

    def has_learnt(self, document: Document) -> bool:
        """Return whether a training document is known, maybe under another name."""
        return document.digest in self.train or document.text_digest in self.learnt

    def has_held_out(self, document: Document) -> bool:
        """Return whether a held-out document is known, maybe under another name."""
        return document.digest in self.held_out or document.text_digest in self.tested

    def __or__(self, other: "KnownDocuments") -> "KnownDocuments":
        """Return the documents of two runs."""
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return KnownDocuments(*(mine | theirs for mine, theirs in both))


@dataclass(frozen=True)
class Sides:
    """The documents of a source on the two sides of the split.

    Attributes:
        train: training documents.
        held_out: held-out documents.
        report: report of the cleaning.
        commit: commit of the git repository; None for other sources.
        follows: whether commits are on the side of the files that they changed.
    """

    train: list[Document]
    held_out: list[Document]
    report: CleanReport
    commit: str | None
    follows: bool


NONE_KNOWN = KnownDocuments(frozenset(), frozenset())


Choose = Callable[[list[Document], list[Document]], tuple[list[Document], list[Document]]]


def both(
    train: list[Document], validation: list[Document]
) -> tuple[list[Document], list[Document]]:
    """Return all training and all validation documents."""
    return train, validation


def build_corpus(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    progress: Progress = silent,
    choose: Choose = both,
    validation: bool = False,
    known: KnownDocuments = NONE_KNOWN,
) -> Corpus:
    """Return the corpus in `folder`, building it from `source` if it is missing.

    An existing corpus is not updated even if the source has changed, so that a resumed run sees the
    same text.

    Args:
        source: text sources and split.
        tokenizer: tokenizer of the model.
        folder: folder of the corpus.
        progress: shows the progress.
        choose: takes the training and the validation documents, and returns those to use of each;
            questions and gaps are made afterwards. Default: all.
        validation: move half of the held-out text to a validation set (see `halve`).
        known: documents of earlier runs, which stay on their side of the split.

    Raises:
        DataError: a part of the corpus would be empty, or the source cannot be read.
    """
    notes = folder / "corpus.json"
    if not notes.is_file():
        sides = read_sides(source, progress, known)
        train = sides.train
        held_out = sides.held_out
        halves = halve(held_out, source.by, source.seed) if validation else ([], held_out)
        halves = keep_validation(*halves, known.validated)
        chosen, to_validate = choose(train, halves[0])
        if validation and not to_validate:
            raise DataError(
                "The text to hold out cannot be divided into a part to choose the best state by "
                "and one to report on; give more documents, hold out more, or split by file."
            )
        questions = folder / "questions.jsonl"
        mixed = mix_questions(chosen, held_out, tokenizer, source.questions, questions)
        if source.infill:
            TokenShards.build(mixed, tokenizer, folder / WHOLE, progress=progress)
        gapped = with_gaps(mixed, source.infill, source.seed)
        TokenShards.build(gapped, tokenizer, folder / "train", progress=progress)
        if validation:
            TokenShards.build(to_validate, tokenizer, folder / "validation", progress=progress)
        TokenShards.build(halves[1], tokenizer, folder / "held-out", progress=progress)
        firsts = {document.name for document in halves[0]}
        noted = {
            "documents": digests(train),
            # If documents were cut in two, their halves are recorded too.
            "held_out": digests([*held_out, *halves[0]]),
            "train_names": names_and_duplicates(train, sides.report),
            "held_out_names": names_and_duplicates(held_out, sides.report),
            "learnt": text_digests(train),
            "tested": text_digests([*held_out, *halves[0]]),
            "validated": text_digests(each for each in held_out if each.name in firsts),
        }
        about = {"report": str(sides.report), "commit": sides.commit, FOLLOWS: sides.follows}
        write_json(notes, {**about, **noted})
    stored = read_object(notes)
    return Corpus(
        TokenShards(folder / "train"),
        TokenShards(folder / "held-out"),
        TokenShards(folder / "validation") if validation else None,
        str(stored.get("report")),
        stored.get("commit"),
    )


def whole_text(folder: Path) -> TokenShards:
    """Return the training text of a corpus without gaps, for relevance tables and retrieval
    indexes: markers and rearranged excerpts are not part of the source.
    """
    return TokenShards(folder / (WHOLE if (folder / WHOLE).is_dir() else "train"))


def names_and_duplicates(documents: Iterable[Document], report: CleanReport) -> list[str]:
    """Return the names of documents and of their duplicates that were dropped, sorted."""
    retained = {document.name for document in documents}
    dropped = {name for name, same in report.duplicates.items() if same in retained}
    return sorted(retained | dropped)


def digests(documents: Sequence[Document]) -> list[str]:
    """Return the digests of documents, each once, sorted."""
    return sorted({document.digest for document in documents})


def text_digests(documents: Iterable[Document]) -> list[str]:
    """Return the digests of the texts of documents, each once, sorted."""
    return sorted({document.text_digest for document in documents})


def known_documents(folder: Path) -> KnownDocuments:
    """Return the documents that the source of a corpus held.

    Raises:
        DataError: the corpus is of an earlier version, which did not record them.
    """
    notes = read_object(folder / "corpus.json")
    train, held_out = (notes.get(name) for name in ("documents", "held_out"))
    if not (isinstance(train, list) and isinstance(held_out, list)):
        raise DataError(
            f"{folder} does not say which documents it has, as an earlier version built it; train "
            "the expert anew, under another name."
        )
    # Earlier versions recorded no texts, or no names of training documents.
    fields = ("learnt", "tested", "validated", "train_names", "held_out_names")
    rest = (notes.get(name, []) for name in fields)
    return KnownDocuments(*(frozenset(map(str, part)) for part in (train, held_out, *rest)))


def commits_follow_files(folder: Path) -> bool:
    """Return whether commits are on the side of the files that they changed.

    In corpora of earlier versions they may be on either side.
    """
    return read_object(folder / "corpus.json").get(FOLLOWS) is True


def read_sides(source: Source, progress: Progress, known: KnownDocuments) -> Sides:
    """Read a source, and return its documents on the sides of the split.

    Args:
        source: text sources and split.
        progress: shows the progress.
        known: documents of earlier runs, which stay on their side.
    """
    skipped = Skipped()
    repository = open_repository(source.git) if source.git else None
    # Commits that are made while the text is read are ignored.
    head = find_commit(repository, "HEAD") if repository else None
    commit = str(head.id) if head else None
    if source.git and source.by == "time":
        train, held_out, report = past_and_future(source, skipped, progress, commit)
    else:
        documents, report = clean(read_source(source, skipped, commit), skipped, progress)
        train, held_out = split(documents, source.held_out, by=source.by, seed=source.seed)
    if source.by == "time":  # an update may train on what was held out
        train, held_out = keep_sides(train, held_out, known.learnt, frozenset(), KnownNames())
        return Sides(train, held_out, report, commit, follows=False)
    renamed = list(renamed_files(repository, head)) if repository and head else []
    names = with_later_names(known.names, renamed)
    train, held_out = keep_sides(train, held_out, known.learnt, known.tested, names)
    # If all files are on one side, commits have none to follow on the other.
    follows = has_files(train) and has_files(held_out)
    if repository and follows:
        lots = draw_lots(documents, source.held_out, source.by, source.seed)
        kept_lots = replace(lots, known=names)
        files = FileSides(train, held_out, kept_lots, renamed, report.duplicates)
        settled = known.learnt | known.tested
        train, held_out = follow_files(documents, frozenset(held_out), files, settled)
    return Sides(train, held_out, report, commit, follows)


def has_files(documents: Iterable[Document]) -> bool:
    """Return whether there are other documents than commits."""
    return any(document.kind != "commit" for document in documents)


def past_and_future(
    source: Source, skipped: Skipped, progress: Progress, commit: str | None = None
) -> tuple[list[Document], list[Document], CleanReport]:
    """Return the documents before the last commits and those that these commits changed.

    Both are cleaned together, since text that repeats the past tests nothing.

    Raises:
        DataError: the source has other parts besides a git repository.
    """
    if source.git is None or any((source.folder, source.jsonl, source.parquet)):
        raise DataError(
            "Splitting by time needs a git repository alone; split by file, or leave the other "
            "texts out."
        )
    past, future = read_git_by_time(source.git, source.held_out, commit or "HEAD", skipped=skipped)
    documents, report = clean([*past, *future], skipped, progress)
    later = {document.name for document in future}
    train = [document for document in documents if document.name not in later]
    return train, [document for document in documents if document.name in later], report


def read_source(source: Source, skipped: Skipped, commit: str | None = None) -> Iterator[Document]:
    """Yield the documents of every part of a source.

    Args:
        source: the source.
        skipped: counter of skipped items.
        commit: commit of the git repository to read; default: HEAD.

    Raises:
        DataError: the source has no path.
    """
    if not any((source.git, source.folder, source.jsonl, source.parquet)):
        raise DataError(
            "No text is given; name a git repository, a folder, a JSONL or a Parquet file."
        )
    if source.git:
        yield from read_git(source.git, commit or "HEAD", skipped=skipped)
    if source.folder:
        yield from read_folder(source.folder, skipped)
    for file in filter(None, (source.jsonl, source.parquet)):
        yield from read_records(file)
