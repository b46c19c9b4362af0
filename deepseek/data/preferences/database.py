"""The preference database: pairs of answers of which one is preferred, with where they come from
and who judged them.

One SQLite file. What a call has returned for is on the disk (write-ahead log, `synchronous=FULL`),
so a kill or a power cut loses nothing that was acknowledged, and an import that was cut goes on by
running it again: duplicates are refused.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from deepseek.data.text.document import Progress, silent, uniform
from deepseek.errors import DataError

Split = Literal["train", "eval"]

APPLICATION_ID = 0x44534B50
"""Marks the file as ours; SQLite keeps it in the header."""

BATCH = 2_000
"""Pairs a transaction of an import; each transaction waits for the disk once."""

SCHEMA = (
    """CREATE TABLE pairs (
        id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, chosen TEXT NOT NULL,
        rejected TEXT NOT NULL, source TEXT NOT NULL, labels TEXT NOT NULL, scores TEXT NOT NULL, lot REAL NOT NULL,
        spoken TEXT NOT NULL)""",
    """CREATE TABLE revisions (
        id INTEGER PRIMARY KEY, pair INTEGER NOT NULL REFERENCES pairs, before TEXT NOT NULL,
        time TEXT DEFAULT CURRENT_TIMESTAMP)""",
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value REAL NOT NULL)",
    "INSERT INTO settings VALUES ('eval_share', 0.1)",
    """CREATE VIEW shown AS SELECT id, prompt, chosen, rejected, source, labels, scores, lot FROM pairs""",
    "CREATE VIRTUAL TABLE words USING fts5 (spoken, chosen, rejected, content=pairs, content_rowid=id)",
    """CREATE TRIGGER pairs_insert AFTER INSERT ON pairs BEGIN
        INSERT INTO words (rowid, spoken, chosen, rejected) VALUES (new.id, new.spoken, new.chosen, new.rejected);
    END""",
    """CREATE TRIGGER pairs_update AFTER UPDATE ON pairs BEGIN
        INSERT INTO words (words, rowid, spoken, chosen, rejected)
            VALUES ('delete', old.id, old.spoken, old.chosen, old.rejected);
        INSERT INTO words (rowid, spoken, chosen, rejected) VALUES (new.id, new.spoken, new.chosen, new.rejected);
    END""",
    f"PRAGMA application_id = {APPLICATION_ID}",
)
"""`lot` decides a pair's side of the split; `spoken` is the prompt as plain text, for the index of
words.
"""


REVIEWED = "reviewed"
"""Label of pairs that a person has judged."""

UNREVIEWED = (
    """CREATE INDEX IF NOT EXISTS unreviewed ON pairs (id) WHERE instr(labels, '"reviewed"') = 0"""
)
"""Leads to the pairs without that label; a database from before there was one gets it when it is
opened.
"""


@dataclass(frozen=True)
class Preference:
    """One pair.

    Attributes:
        prompt: the conversation before the answers, as `{"role", "content"}` messages.
        chosen, rejected: the two answers.
        source: where the pair comes from, such as a file or a judge's name.
        labels: topics or flags.
        scores: judge -> (score of `chosen`, score of `rejected`).
        id: its number in the database; 0 before it is there.
    """

    prompt: tuple[Mapping[str, str], ...]
    chosen: str
    rejected: str
    source: str = ""
    labels: tuple[str, ...] = ()
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    id: int = 0

    @property
    def digest(self) -> str:
        """What two pairs share that are the same: prompt and answers."""
        return sha256(
            json.dumps([self._prompt_text, self.chosen, self.rejected]).encode()
        ).hexdigest()

    @property
    def _prompt_text(self) -> str:
        return json.dumps(
            [dict(message) for message in self.prompt], ensure_ascii=False, sort_keys=True
        )

    def row(self) -> tuple[Any, ...]:
        """Return the columns of `pairs` but the id; all pairs of a prompt have the same `lot`."""
        text = self._prompt_text
        spoken = "\n".join(message["content"] for message in self.prompt)
        labels = json.dumps(self.labels)
        scores = json.dumps({name: list(both) for name, both in self.scores.items()})
        return (
            self.digest,
            text,
            self.chosen,
            self.rejected,
            self.source,
            labels,
            scores,
            uniform(text),
            spoken,
        )

    @staticmethod
    def of(row: Sequence[Any]) -> "Preference":
        """Return the pair of a database row of the view `shown`."""
        scores = {name: (both[0], both[1]) for name, both in json.loads(row[6]).items()}
        return Preference(
            tuple(json.loads(row[1])),
            row[2],
            row[3],
            row[4],
            tuple(json.loads(row[5])),
            scores,
            row[0],
        )


@dataclass(frozen=True)
class Added:
    """What an import did: pairs added, and pairs refused because they were there."""

    new: int
    duplicates: int


@dataclass(frozen=True)
class Statistics:
    """What is in the database.

    Attributes:
        pairs, prompts: how many, distinct prompts for the latter.
        splits: pairs of each split. sources: pairs of each source. labels: pairs of each label.
        agreement: judge -> share of the pairs it scored in which it scores `chosen` higher.
        revisions: changes made to pairs.
    """

    pairs: int
    prompts: int
    splits: dict[str, int]
    sources: dict[str, int]
    labels: dict[str, int]
    agreement: dict[str, float]
    revisions: int


INSERT = """INSERT OR IGNORE INTO pairs (digest, prompt, chosen, rejected, source, labels, scores, lot, spoken)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"""
UPDATE = """UPDATE pairs SET digest = ?, prompt = ?, chosen = ?, rejected = ?, source = ?, labels = ?, scores = ?,
    lot = ?, spoken = ? WHERE id = ?"""


class PreferenceDatabase:
    """The pairs in one file, which several processes may read while one writes.

    Raises `DataError` from every method if the file is not such a database, is damaged or locked
    for half a minute.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the database at `path`, or make an empty one."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                self._create()
            elif self._db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                raise sqlite3.DatabaseError("it belongs to another program")
            self._db.execute(UNREVIEWED)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def add(self, pair: Preference) -> int | None:
        """Add one pair and return its id, or None if it is there already."""
        added = self.add_all([pair])
        return (
            int(self._one("SELECT id FROM pairs WHERE digest = ?", pair.digest))
            if added.new
            else None
        )

    def add_all(
        self, pairs: Iterable[Preference], progress: Progress = silent, total: int = 0
    ) -> Added:
        """Add many pairs, in transactions of `BATCH`; what progress has been told of is on the
        disk.
        """
        before = self._one("SELECT count(*) FROM pairs")
        seen = 0
        source = iter(pairs)
        while rows := [pair.row() for pair in islice(source, BATCH)]:
            with self._transaction():
                self._db.executemany(INSERT, rows)
            seen += len(rows)
            progress(seen, total, "preferences")
        new = self._one("SELECT count(*) FROM pairs") - before
        return Added(new, seen - new)

    def get(self, pair_id: int) -> Preference:
        """Return a pair; raise `DataError` if there is none of this id."""
        row = next(self._rows("SELECT * FROM shown WHERE id = ?", pair_id), None)
        if row is None:
            raise DataError(
                f"There is no preference {pair_id} in {self.path}; `deepseek prefs search` lists some."
            )
        return Preference.of(row)

    def unreviewed(self, after: int = 0) -> Preference | None:
        """Return the first pair after the id `after` that nobody has reviewed."""
        number = self._one(
            """SELECT min(id) FROM pairs INDEXED BY unreviewed WHERE id > ? AND instr(labels, '"reviewed"') = 0""",
            after,
        )
        return None if number is None else self.get(number)

    def reviewed(self) -> tuple[int, int]:
        """Return how many pairs there are, and how many of them somebody has reviewed."""
        pairs = self._one("SELECT count(*) FROM pairs")
        left = """SELECT count(*) FROM pairs INDEXED BY unreviewed WHERE instr(labels, '"reviewed"') = 0"""
        return pairs, pairs - self._one(left)

    def revise(self, pair_id: int, **changes: Any) -> Preference:
        """Change fields of a pair and keep what it was before; return the new one.

        Raises `DataError` if another pair has this prompt and these answers already.
        """
        before = self.get(pair_id)
        after = replace(before, **changes)
        try:
            with self._transaction():
                self._db.execute(
                    "INSERT INTO revisions (pair, before) VALUES (?, ?)",
                    (pair_id, json.dumps(asdict(before), ensure_ascii=False)),
                )
                self._db.execute(UPDATE, (*after.row(), pair_id))
        except sqlite3.IntegrityError:
            raise DataError(
                f"The change would make preference {pair_id} a duplicate of another one."
            ) from None
        return after

    def history(self, pair_id: int) -> list[dict[str, Any]]:
        """Return what a pair was before each of its revisions, oldest first."""
        rows = self._rows("SELECT before FROM revisions WHERE pair = ? ORDER BY id", pair_id)
        return [json.loads(before) for (before,) in rows]

    def search(self, text: str, limit: int = 20) -> list[Preference]:
        """Return pairs that hold all words of `text` somewhere, newest first."""
        words = " ".join('"' + word.replace('"', '""') + '"' for word in text.split())
        if not words:
            return list(islice(self.pairs(), limit))
        rows = self._rows(
            "SELECT * FROM shown WHERE id IN "
            "(SELECT rowid FROM words WHERE words MATCH ? ORDER BY rowid DESC LIMIT ?) ORDER BY id DESC",
            words,
            limit,
        )
        return [Preference.of(row) for row in rows]

    def set_eval_share(self, share: float) -> None:
        """Hold this share of the prompts out for evaluation; raise `DataError` outside [0, 1)."""
        if not 0.0 <= share < 1.0:
            raise DataError(f"The share to hold out must lie in [0, 1); got {share}.")
        with self._transaction():
            self._db.execute("UPDATE settings SET value = ? WHERE name = 'eval_share'", (share,))

    def pairs(self, split: Split | None = None) -> Iterator[Preference]:
        """Yield the pairs of a split (None: all) in the order of their ids."""
        share = self._one("SELECT value FROM settings WHERE name = 'eval_share'")
        low, high = {None: (0.0, 1.0), "train": (share, 1.0), "eval": (0.0, share)}[split]
        rows = self._rows("SELECT * FROM shown WHERE lot >= ? AND lot < ? ORDER BY id", low, high)
        yield from map(Preference.of, rows)

    def statistics(self) -> Statistics:
        """Count what is there."""
        share = self._one("SELECT value FROM settings WHERE name = 'eval_share'")
        pairs = self._one("SELECT count(*) FROM pairs")
        held = self._one("SELECT count(*) FROM pairs WHERE lot < ?", share)
        labels = (
            "SELECT value, count(*) FROM pairs, json_each(labels) GROUP BY 1 ORDER BY 2 DESC, 1"
        )
        agreement = (
            "SELECT judge.key, avg(json_extract(judge.value, '$[0]') > json_extract(judge.value, '$[1]')) "
            "FROM pairs, json_each(scores) AS judge GROUP BY 1 ORDER BY 1"
        )
        return Statistics(
            pairs=pairs,
            prompts=self._one("SELECT count(DISTINCT prompt) FROM pairs"),
            splits={"train": pairs - held, "eval": held},
            sources=dict(
                self._rows("SELECT source, count(*) FROM pairs GROUP BY 1 ORDER BY 2 DESC, 1")
            ),
            labels=dict(self._rows(labels)),
            agreement=dict(self._rows(agreement)),
            revisions=self._one("SELECT count(*) FROM revisions"),
        )

    def check(self) -> None:
        """Raise `DataError` if the file is damaged or its word index does not match its pairs."""
        with self._explained():
            found = self._db.execute("PRAGMA integrity_check").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            self._db.execute("INSERT INTO words (words) VALUES ('integrity-check')")

    def _create(self) -> None:
        with self._transaction():
            for statement in SCHEMA:
                self._db.execute(statement)

    def _rows(self, query: str, *values: Any) -> Iterator[Any]:
        with self._explained():
            yield from self._db.execute(query, values)

    def _one(self, query: str, *values: Any) -> Any:
        return next(self._rows(query, *values))[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise DataError(
                f"{self.path} cannot be used as a preference database ({error}); name another file, or restore a copy."
            ) from error
