"""After an update, retrieval cites the files that the source has now, under their current names."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer

from deepseek.checkpoint.store import read_json, write_json
from deepseek.data import Document
from deepseek.train.jobs.expert_index import learnt_documents
from deepseek.train.text.corpus import KnownDocuments, Source, build_corpus, known_documents

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")
CODE = [f"{number}.py" for number in range(6)]
PROSE = [f"{number}.txt" for number in range(6)]


def text_of(name: str) -> str:
    """Return lines that no other file has."""
    draw = random.Random(name)
    lines = [" = ".join(draw.sample(WORDS, 2)) + f" + {draw.random()}\n" for _ in range(20)]
    return "".join(lines)


@dataclass
class Learnt:
    """An expert's run folder without training, and its source."""

    run: Path
    source: Source

    def read(self, folder: Path, known: KnownDocuments | None = None) -> None:
        """Build the corpus of a run; that of an update holds only what is new."""
        if known is None:
            build_corpus(self.source, tiny_tokenizer(), folder / "corpus")
        else:
            choose = partial(only_new, known=known)
            build_corpus(
                self.source, tiny_tokenizer(), folder / "corpus", choose=choose, known=known
            )
        write_json(folder / "result.json", {})

    def update(self) -> None:
        self.read(self.run / "updates" / "first", known_documents(self.run / "corpus"))

    def documents(self) -> list[Document]:
        return list(learnt_documents(self.run, tiny_tokenizer()))

    def trained_on(self, names: Iterable[str]) -> list[str]:
        """Return those of the names that are not held out."""
        noted = read_json(self.run / "corpus" / "corpus.json")["train_names"]
        return [name for name in names if f"source/{name}" in noted]


def only_new(
    train: list[Document], validation: list[Document], known: KnownDocuments
) -> tuple[list[Document], list[Document]]:
    """Return the training documents that are not known, and all validation documents."""
    return [document for document in train if not known.has_learnt(document)], validation


@pytest.fixture(params=["folder", "records"])
def learnt(request: pytest.FixtureRequest, tmp_path: Path) -> Learnt:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in [*CODE, *PROSE]:
        (folder / name).write_text(text_of(name))
    records = tmp_path / "records.jsonl" if request.param == "records" else None
    if records:
        records.write_text('{"text": "A record of the stars that is in no file at all."}\n')
    source = Source(folder=folder, jsonl=records, held_out=0.2)
    learnt = Learnt(tmp_path / "run", source)
    learnt.read(learnt.run)
    write_json(learnt.run / "request.json", {"source": source.as_json()})
    return learnt


def test_files_that_are_gone_are_not_cited_and_renamed_ones_have_their_new_names(
    learnt: Learnt,
) -> None:
    folder = learnt.source.folder
    assert folder is not None
    deleted, moved, renamed, changed, *_ = learnt.trained_on(CODE)
    deleted_prose, renamed_prose, *_ = learnt.trained_on(PROSE)
    assert f"source/{deleted}" in {document.name for document in learnt.documents()}
    for name in (deleted, deleted_prose):
        (folder / name).unlink()
    (folder / "later").mkdir()
    (folder / moved).rename(folder / "later" / moved)
    (folder / renamed).rename(folder / "other.py")
    (folder / renamed_prose).rename(folder / "other.txt")
    (folder / changed).write_text(text_of("changed"))
    learnt.update()
    documents = {document.name: document.text.strip() for document in learnt.documents()}
    names = {name.removeprefix("source/") for name in documents}
    assert not names & {deleted, moved, renamed}
    assert documents[f"source/later/{moved}"] == text_of(moved).strip()
    assert documents["source/other.py"] == text_of(renamed).strip()
    assert documents[f"source/{changed}"] == text_of("changed").strip()
    texts = {*documents.values()}
    assert text_of(renamed_prose).strip() in texts
    # Records and prose are stored without names, so with records in the source, both stay.
    assert (text_of(deleted_prose).strip() in texts) == (learnt.source.jsonl is not None)
