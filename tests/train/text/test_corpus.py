"""Training text from a repository holds nothing that came later, if it is split by time, and
otherwise nothing of held-out files.
"""

import json
import random
import re
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pygit2
import pytest
from git_history import Files, History
from tiny_tokenizer import tiny_tokenizer

from deepseek.data import Document, TokenShards, read_folder, read_git, split
from deepseek.data.text.decode import decode_documents
from deepseek.data.text.document import silent
from deepseek.errors import DataError
from deepseek.train.text import corpus as corpus_module
from deepseek.train.text.corpus import (
    NONE_KNOWN,
    Corpus,
    KnownDocuments,
    Source,
    build_corpus,
    commits_follow_files,
    digests,
    known_documents,
    read_sides,
    text_digests,
    whole_text,
)
from deepseek.train.text.fresh import fresh
from deepseek.train.text.question_mix import asked_about, mix_questions, with_questions


def commit(repository: pygit2.Repository, name: str, text: str, time: int) -> None:
    """Write a file and commit it at `time`."""
    (Path(repository.workdir) / name).write_text(text)
    repository.index.add(name)
    author = pygit2.Signature("a", "a@example.org", time)
    parents = [] if repository.head_is_unborn else [repository.head.target]
    repository.create_commit(
        "HEAD", author, author, f"add {name}", repository.index.write_tree(), parents
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Ten commits that each add a file; the last one also rewrites the first file."""
    made = pygit2.init_repository(tmp_path / "repo")
    for number in range(10):
        commit(
            made,
            f"f{number}.py",
            f"def function_{number}(value):\n    return value + {number}\n" * 5,
            1000 + number,
        )
    commit(made, "f0.py", "SECRET_OF_THE_FUTURE = True\n" * 5, 2000)
    return tmp_path / "repo"


def test_the_past_knows_nothing_of_the_future(repository: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    corpus = build_corpus(
        Source(git=repository, by="time", held_out=0.3), tokenizer, tmp_path / "corpus"
    )
    past, future = (
        tokenizer.decode([int(i) & 0x7FFFFFFF for i in shards.ids_N])
        for shards in (corpus.train, corpus.held_out)
    )
    assert "SECRET_OF_THE_FUTURE" not in past and "function_0" in past
    assert "SECRET_OF_THE_FUTURE" in future and "function_9" in future and "function_9" not in past


@pytest.mark.parametrize("by", ["file", "time"])
def test_a_commit_during_the_reading_is_neither_read_nor_noted(
    by: Any, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pygit2.Repository(repository)
    head = str(made.head.target)
    find = corpus_module.find_commit

    def found(*arguments: Any) -> Any:
        commit_found = find(*arguments)
        commit(made, "late.py", "TOO_LATE = True\n" * 9, 3000)
        return commit_found

    monkeypatch.setattr(corpus_module, "find_commit", found)
    source = Source(git=repository, by=by, held_out=0.3)
    corpus = build_corpus(source, tiny_tokenizer(), tmp_path / "corpus")
    assert corpus.commit == head
    assert "TOO_LATE" not in text_of(corpus.train) + text_of(corpus.held_out)


@pytest.fixture
def history(tmp_path: Path) -> History:
    """Twelve files, added one by one, then changed in pairs; five are renamed."""
    history = History(tmp_path / "checkout")
    files: Files = {}
    for number in range(12):
        files[f"{number}.py"] = history.new_lines(9)
        history.commit(files)
    for first, second in pairwise(list(files)):
        files |= {path: files[path] + history.new_lines(2) for path in (first, second)}
        history.commit(files)
    history.commit({f"moved/{path}" if path < "3" else path: files[path] for path in files})
    return history


def sides_of(corpus: Corpus) -> list[list[Document]]:
    """Return the training, the validation and the held-out documents."""
    shards = (corpus.train, corpus.validation, corpus.held_out)
    return [list(decode_documents(part, tiny_tokenizer())) for part in shards if part]


def lines_of(*sides: list[Document]) -> set[str]:
    """Return the lines of files in documents, including those shown in commits."""
    return {line for side in sides for d in side for line in re.findall(r"line_\d+", d.text)}


@pytest.mark.parametrize("seed", range(5))
def test_no_line_of_held_out_files_is_trained_on(
    history: History, tmp_path: Path, seed: int
) -> None:
    source = Source(git=history.path, held_out=0.3, seed=seed)
    corpus = build_corpus(source, tiny_tokenizer(), tmp_path / "corpus", validation=True)
    train, *tests = sides_of(corpus)
    assert {document.kind for document in train} == {"code", "commit"}
    assert lines_of(train) and lines_of(*tests) and not lines_of(train) & lines_of(*tests)
    assert commits_follow_files(tmp_path / "corpus")


def test_an_update_of_a_history_finds_new_what_is_new_alone(
    history: History, tmp_path: Path
) -> None:
    source = Source(git=history.path, held_out=0.3, seed=1)
    first = sides_of(build_corpus(source, tiny_tokenizer(), tmp_path / "first", validation=True))
    known = known_documents(tmp_path / "first")
    choose = partial(fresh, known=known, seed=0, name="words")
    with pytest.raises(DataError, match="no new text"):
        build_corpus(source, tiny_tokenizer(), tmp_path / "again", silent, choose, True, known)

    held_out = next(document.name for document in first[2] if document.kind == "code")
    files = {d.name: d.text for d in read_git(history.path, commits=False) if d.name != held_out}
    files |= {"engine/new.py": history.new_lines(9)}
    history.commit({name.removeprefix("engine/"): text for name, text in files.items()})
    sides = read_sides(source, silent, known)
    unknown = [document for document in sides.train if not known.has_learnt(document)]
    unknown += [document for document in sides.held_out if not known.has_held_out(document)]
    assert [document.kind for document in unknown] == ["code", "commit"]
    assert not lines_of(unknown) & lines_of(*first), "what was held out is gone, not new"


def test_an_update_does_not_learn_again_the_commits_that_an_earlier_version_left_whole(
    history: History,
) -> None:
    train, held_out = split(list(read_git(history.path)), 0.3)
    known = KnownDocuments(
        *(frozenset(digests(side)) for side in (train, held_out)),
        *(frozenset(text_digests(side)) for side in (train, held_out)),
    )
    sides = read_sides(Source(git=history.path, held_out=0.3), silent, known)
    assert (sides.train, sides.held_out) == (train, held_out)


def test_commits_without_files_are_split_by_themselves(tmp_path: Path) -> None:
    history = History(tmp_path / "checkout")
    for _ in range(20):
        history.commit({"notes.md": history.new_lines(9)})
    history.commit({"empty.md": ""})
    source = Source(git=history.path, held_out=0.3)
    corpus = build_corpus(source, tiny_tokenizer(), tmp_path / "corpus")
    train, held_out = sides_of(corpus)
    assert train and held_out and len(train) + len(held_out) == 21
    assert not commits_follow_files(tmp_path / "corpus")


def test_time_needs_git_alone(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="git repository alone"):
        build_corpus(
            Source(git=repository, folder=tmp_path, by="time"),
            tiny_tokenizer(),
            tmp_path / "corpus",
        )


def test_by_time_what_stops_a_run_is_older_than_what_is_reported(
    repository: Path, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    source = Source(git=repository, by="time", held_out=0.5)
    corpus = build_corpus(source, tokenizer, tmp_path / "corpus", validation=True)
    assert corpus.validation is not None
    past, middle, last = (
        tokenizer.decode([int(i) & 0x7FFFFFFF for i in shards.ids_N])
        for shards in (corpus.train, corpus.validation, corpus.held_out)
    )
    assert "SECRET_OF_THE_FUTURE" in last and "SECRET_OF_THE_FUTURE" not in middle + past
    assert "function_9" in last and "function_9" not in middle + past
    newest = [
        max(number for number in range(10) if f"function_{number}" in text)
        for text in (past, middle, last)
    ]
    assert newest == sorted(set(newest))


def text_of(shards: TokenShards) -> str:
    """Return the text of the shards."""
    return tiny_tokenizer().decode([int(identity) & 0x7FFFFFFF for identity in shards.ids_N])


def test_tables_and_indexes_see_text_without_gaps(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(12):
        (source / f"f{number}.py").write_text(
            f"def load_{number}(path):\n    return {number}\n" * 9
        )
    plain, gapped = (
        build_corpus(
            Source(folder=source, held_out=0.3, infill=infill), tiny_tokenizer(), tmp_path / name
        )
        for name, infill in (("plain", 0.0), ("gapped", 0.9))
    )
    assert "<fim_suffix>" in text_of(gapped.train)
    assert whole_text(tmp_path / "gapped").digest == plain.train.digest
    assert whole_text(tmp_path / "plain").digest == plain.train.digest


def test_documents_stay_on_their_side_under_other_names(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.txt").write_text(f"part {number} is about {number * number} things\n")
    tokenizer = tiny_tokenizer()
    text = Source(folder=source, held_out=0.3)

    def built(name: str, known: KnownDocuments = NONE_KNOWN) -> list[set[str]]:
        corpus = build_corpus(text, tokenizer, tmp_path / name, validation=True, known=known)
        parts = (corpus.train, corpus.validation, corpus.held_out)
        return [{d.text for d in decode_documents(part, tokenizer)} for part in parts if part]

    before = built("before")
    for path in list(source.iterdir()):
        path.rename(source / f"renamed-{path.name}")
    after = built("after", known_documents(tmp_path / "before"))
    assert after[0] == before[0] and after[1] | after[2] == before[1] | before[2]
    assert after[2] and not after[2] & before[1], "what chose the best state is not reported"
    everything = frozenset(document.text_digest for document in read_folder(source))
    with pytest.raises(DataError, match="learnt before"):
        built("none", replace(NONE_KNOWN, learnt=everything))


@pytest.mark.parametrize("seed", range(6))
def test_duplicates_are_trained_on_or_held_out_as_one(tmp_path: Path, seed: int) -> None:
    history = History(tmp_path / "checkout")
    files: Files = {}
    for number in range(8):
        files[f"a{number}.py"] = history.new_lines(30)
        history.commit(files)
        files[f"b{number}.py"] = files[f"a{number}.py"] + "line_0 = 1\n" * (number % 2)
        history.commit(files)
    sides = read_sides(Source(git=history.path, held_out=0.4, seed=seed), silent, NONE_KNOWN)
    assert sides.follows and lines_of(sides.held_out)
    assert lines_of(sides.train) & lines_of(sides.held_out) <= {"line_0"}


@pytest.mark.parametrize("seed", range(4))
def test_a_duplicate_stays_on_its_side_when_it_is_one_no_longer(tmp_path: Path, seed: int) -> None:
    history = History(tmp_path / "checkout")
    files = {f"a{number}.py": history.new_lines(30) for number in range(8)}
    files |= {path.replace("a", "b"): text for path, text in files.items()}
    history.commit(files)
    source = Source(git=history.path, held_out=0.4, seed=seed)
    build_corpus(source, tiny_tokenizer(), tmp_path / "first")
    first = read_sides(source, silent, NONE_KNOWN)
    for path in [path for path in files if path.startswith("b")]:
        files[path] = "".join(files[path].splitlines(keepends=True)[:15]) + history.new_lines(20)
    history.commit(files)
    sides = read_sides(source, silent, known_documents(tmp_path / "first"))
    assert len([d for d in [*sides.train, *sides.held_out] if d.kind == "code"]) == 16
    assert not lines_of(sides.train) & lines_of(first.held_out)
    assert not lines_of(sides.held_out) & lines_of(first.train)


def changed_under_other_names(history: History) -> None:
    """Rename all files and add a line to each."""
    files = {d.name.removeprefix("engine/"): d.text for d in read_git(history.path, commits=False)}
    later = {f"later/{path}": text + history.new_lines(1) for path, text in files.items()}
    history.commit(later)


@pytest.mark.parametrize("seed", range(4))
def test_documents_stay_on_their_side_under_other_names_with_other_text(
    history: History, tmp_path: Path, seed: int
) -> None:
    source = Source(git=history.path, held_out=0.3, seed=seed)
    build_corpus(source, tiny_tokenizer(), tmp_path / "first")
    first = read_sides(source, silent, NONE_KNOWN)
    known = known_documents(tmp_path / "first")
    for _ in range(2):
        changed_under_other_names(history)
        sides = read_sides(source, silent, known)
        assert not lines_of(sides.train) & lines_of(first.held_out)
        assert not lines_of(sides.held_out) & lines_of(first.train)
    gone = [next(d for d in side if d.kind == "code") for side in (sides.train, sides.held_out)]
    files = {d.name.removeprefix("engine/"): d.text for d in read_git(history.path, commits=False)}
    for document in gone:  # changed, then deleted: only the commits show it
        path = document.name.removeprefix("engine/")
        history.commit(files | {path: document.text + history.new_lines(1)})
        del files[path]
        history.commit(files)
    sides = read_sides(source, silent, known)
    assert sides.follows
    assert not lines_of(sides.train) & lines_of(first.held_out)
    assert not lines_of(sides.held_out) & lines_of(first.train)


def test_files_stay_on_their_side_if_they_change_after_they_were_renamed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(30):
        (source / f"{number}.txt").write_text(f"part {number} is about {number * number} things\n")
    text = Source(folder=source, held_out=0.3)
    build_corpus(text, tiny_tokenizer(), tmp_path / "before")
    known = known_documents(tmp_path / "before")
    before = {d.text for d in read_sides(text, silent, NONE_KNOWN).train}
    for path in list(source.iterdir()):
        path.rename(source / f"renamed-{path.name}")
    build_corpus(text, tiny_tokenizer(), tmp_path / "renamed", known=known)
    known = known | known_documents(tmp_path / "renamed")
    for path in source.iterdir():
        path.write_text(path.read_text() + "and more\n")
    after = read_sides(text, silent, known)
    assert {d.text.removesuffix("and more\n") for d in after.train} == before
    assert {d.name for d in after.held_out} == known.held_out_names - {
        f"source/{number}.txt" for number in range(30)
    }


def test_a_corpus_of_an_earlier_version_has_no_names_of_training_documents(
    history: History, tmp_path: Path
) -> None:
    source = Source(git=history.path, held_out=0.3)
    build_corpus(source, tiny_tokenizer(), tmp_path / "corpus")
    notes = tmp_path / "corpus" / "corpus.json"
    stored = json.loads(notes.read_text())
    assert known_documents(tmp_path / "corpus").names.learnt == set(stored.pop("train_names"))
    notes.write_text(json.dumps(stored))
    known = known_documents(tmp_path / "corpus")
    assert not known.names.learnt and known.names.tested == set(stored["held_out_names"])
    changed_under_other_names(history)
    held_out = {d.name for d in read_sides(source, silent, known).held_out if d.kind == "code"}
    tested = {name.removeprefix("engine/") for name in known.names.tested if "@" not in name}
    assert {f"engine/later/{path}" for path in tested} <= held_out


def write_conversations(path: Path, lengths: list[int]) -> Path:
    """Write conversations of one question and one answer, which cannot be cut."""
    ask = {"role": "user", "content": "What is the value of the expert?"}
    with open(path, "w") as file:
        for number, length in enumerate(lengths):
            answer = {"role": "assistant", "content": f"{number} " + "the router " * length}
            file.write(json.dumps({"messages": [ask, answer]}) + "\n")
    return path


@pytest.mark.parametrize("seed", range(8))
def test_conversations_have_a_validation_part(tmp_path: Path, seed: int) -> None:
    lengths = random.Random(seed).choices([3, 10, 30, 100, 300], k=12)
    source = Source(jsonl=write_conversations(tmp_path / "chats.jsonl", lengths), held_out=0.25)
    assert len(read_sides(source, silent, NONE_KNOWN).held_out) == 4
    corpus = build_corpus(source, tiny_tokenizer(), tmp_path / "corpus", validation=True)
    assert corpus.validation is not None and corpus.validation.num_tokens
    assert corpus.held_out.num_tokens


def test_what_cannot_be_divided_is_named(tmp_path: Path) -> None:
    path = write_conversations(tmp_path / "chats.jsonl", [5, 10])
    with pytest.raises(DataError, match="cannot be divided into a part to choose"):
        build_corpus(Source(jsonl=path), tiny_tokenizer(), tmp_path / "corpus", validation=True)


def test_questions_with_separators_of_unicode_are_read_again(tmp_path: Path) -> None:
    documents = [
        Document(f"# Part{sign}x\n\nThe **widget** is a tool that builds parts.\n", f"{n}.md")
        for n, sign in enumerate("\u2028\u2029\x85")
    ]
    notes = tmp_path / "questions.jsonl"
    mix_questions(documents, [], tiny_tokenizer(), 0.0, notes)
    asked = asked_about(notes)
    assert all(any(sign in question for question in asked) for sign in "\u2028\u2029\x85")


def test_questions_are_made_after_the_split(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(12):
        text = f'def load_{number}(path, limit={number}00):\n    """Read part {number}."""\n    return {number}\n'
        (source / f"f{number}.py").write_text(text * (1 + number % 2))
    share = 0.4
    plain = build_corpus(Source(folder=source, held_out=0.3), tiny_tokenizer(), tmp_path / "plain")
    mixed = build_corpus(
        Source(folder=source, held_out=0.3, questions=share), tiny_tokenizer(), tmp_path / "mixed"
    )
    assert mixed.held_out.digest == plain.held_out.digest
    assert '"set": "asked"' not in (tmp_path / "plain" / "questions.jsonl").read_text()
    assert asked_about(tmp_path / "plain" / "questions.jsonl")
    added = 1 - plain.train.num_tokens / mixed.train.num_tokens
    assert 0.5 * share < added <= share + 0.05
    records = [
        json.loads(line)
        for line in (tmp_path / "mixed" / "questions.jsonl").read_text().splitlines()
    ]
    trained = text_of(mixed.train)
    for record in records:
        question = record["messages"][0]["content"]
        assert (question in trained) == (record["set"] == "asked")
        assert record["paraphrase"] not in trained
    sources = {
        name: {r["source"] for r in records if r["set"] == name} for name in ("asked", "held out")
    }
    assert sources["asked"] and sources["held out"] and not sources["asked"] & sources["held out"]


def test_without_a_chat_template_nothing_is_asked(tmp_path: Path) -> None:
    documents = [Document('def f(a=3):\n    """Read it."""\n    return 1\n', "a/f.py", "code")]
    tokenizer = tiny_tokenizer(chat_template=None)
    assert mix_questions(documents, [], tokenizer, 0.5, tmp_path / "notes.jsonl") == documents
    with pytest.raises(DataError, match="at least 0 and below 1"):
        with_questions(documents, tiny_tokenizer(), 1.0)
