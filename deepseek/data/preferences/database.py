"""The preference database: pairs of a chosen and a rejected answer, with source and judges' scores.

It is one SQLite file. When a call returns, its changes are on disk (write-ahead log,
`synchronous=FULL`), so a kill or a power cut loses nothing acknowledged. An interrupted import is
resumed by repeating it, since duplicates are skipped.
"""

import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from deepseek import checks
from deepseek.data.preferences.preference import FIELDS, MAX_ID, Preference
from deepseek.data.text.document import Progress, silent
from deepseek.errors import DataError

Split = Literal["train", "eval"]


class MissingPreferenceError(DataError):
    """There is no preference with the requested id."""


class DatabaseFailedError(DataError):
    """The file cannot be read or written now; `__cause__` is SQLite's own error."""


APPLICATION_ID = 0x44534B50
"""Application id in the SQLite header, which identifies our files."""

BATCH = 2_000
"""Pairs per transaction of an import; each transaction waits for the disk once."""

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
"""Column `lot` decides the split of a pair; `spoken` is the prompt as plain text, for full-text
search.
"""


REVIEWED = "reviewed"
"""Label of pairs judged by a person."""

UNREVIEWED = (
    """CREATE INDEX IF NOT EXISTS unreviewed ON pairs (id) WHERE instr(labels, '"reviewed"') = 0"""
)
"""Partial index of the pairs without that label; older databases get it when they are opened."""


@dataclass(frozen=True)
class Added:
    """Result of an import: number of pairs added, and of duplicates skipped."""

    new: int
    duplicates: int


@dataclass(frozen=True)
class Statistics:
    """Statistics of the database.

    Attributes:
        pairs: number of pairs.
        prompts: number of distinct prompts.
        splits: pairs by split.
        sources: pairs by source.
        labels: pairs by label.
        agreement: judge -> share of its scored pairs in which it scores `chosen` higher; ties count
            half.
        revisions: number of changes made to pairs.
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


UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u31f0-\u31ff\u3400-\u9fff"
    r"\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""A character of a script without spaces between words: Thai and Lao, Burmese, Khmer, Japanese and
Chinese. The word index would take all text between two spaces or signs for one word.
"""

CONTAINS_ALL = """NOT EXISTS (SELECT 1 FROM json_each(?)
    WHERE instr(lower(spoken || ' ' || chosen || ' ' || rejected), lower(value)) = 0)"""
"""Condition that a pair's texts contain all parts of a JSON list; it scans texts, not the index."""


class PreferenceDatabase:
    """The pairs in one file; several processes can read it while one writes.

    Args:
        path: the file; an empty database is created if it does not exist.

    Raises:
        DataError: from every method, if the file is not a preference database, is damaged, or is
            locked for 30 seconds.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = checks.path("path", path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            if self._is_new():
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
        """Add one pair and return its id, or None if it is a duplicate."""
        added = self.add_all([pair])
        return (
            int(self._one("SELECT id FROM pairs WHERE digest = ?", pair.digest))
            if added.new
            else None
        )

    def add_all(
        self,
        pairs: Iterable[Preference],
        progress: Progress = silent,
        total: int = 0,
        batch: int = BATCH,
    ) -> Added:
        """Add many pairs, in transactions of `batch`; skip duplicates.

        If `pairs` fails or is interrupted, pairs before that are kept: sampling one takes seconds.

        Args:
            pairs: the pairs.
            progress: called after each transaction, whose pairs are then on disk.
            total: number of pairs, for `progress`; default: 0 (unknown).
            batch: pairs per transaction, which a killed process loses at most; default: `BATCH`.
        """
        new = 0
        duplicates = 0
        source = iter(pairs)
        while (added := self._add_batch(islice(source, batch))) != Added(0, 0):
            new += added.new
            duplicates += added.duplicates
            progress(new + duplicates, total, "preferences")
        return Added(new, duplicates)

    def _add_batch(self, pairs: Iterable[Preference]) -> Added:
        """Add pairs in one transaction, including those before an error."""
        rows: list[tuple[Any, ...]] = []
        new = 0
        try:
            rows.extend(pair.row() for pair in pairs)  # keeps what came before an error
        finally:
            if rows:
                with self._transaction():
                    # Count own rows: other processes may add some at the same time.
                    new = self._db.executemany(INSERT, rows).rowcount
        return Added(new, len(rows) - new)

    def get(self, pair_id: int) -> Preference:
        """Return the pair with this id; raise `MissingPreferenceError` if there is none."""
        checks.whole("pair_id", pair_id, least=-MAX_ID, most=MAX_ID)
        row = next(self._rows("SELECT * FROM shown WHERE id = ?", pair_id), None)
        if row is None:
            raise MissingPreferenceError(
                f"There is no preference {pair_id} in {self.path}; "
                "`deepseek prefs search` lists some."
            )
        return Preference.of(row)

    def unreviewed(self, after: int = 0) -> Preference | None:
        """Return the first unreviewed pair with an id above `after`, None if there is none."""
        checks.whole("after", after, least=0, most=MAX_ID)
        number = self._one(
            """SELECT min(id) FROM pairs INDEXED BY unreviewed WHERE id > ? AND instr(labels, '"reviewed"') = 0""",
            after,
        )
        return None if number is None else self.get(number)

    def reviewed(self) -> tuple[int, int]:
        """Return the number of pairs, and how many of them are reviewed."""
        pairs = self._one("SELECT count(*) FROM pairs")
        left = """SELECT count(*) FROM pairs INDEXED BY unreviewed WHERE instr(labels, '"reviewed"') = 0"""
        return pairs, pairs - self._one(left)

    def revise(self, pair_id: int, **changes: Any) -> Preference:
        """Change fields of a pair, store its old state in the history, and return the new pair.

        Args:
            pair_id: id of the pair.
            changes: fields of `Preference` with their new values.

        Raises:
            DataError: there is no such pair, or the change would make it a duplicate.
            ConfigError: there is no such field, or a value is wrong.
        """
        return self.revise_by(pair_id, lambda _: changes)

    def revise_by(
        self, pair_id: int, change: Callable[[Preference], Mapping[str, Any]]
    ) -> Preference:
        """Revise a pair like `revise`, with changes that depend on the pair.

        No other process changes the pair between the call of `change` and the end.

        Args:
            pair_id: id of the pair.
            change: takes the pair, and returns fields of `Preference` with their new values.

        Raises:
            DataError, ConfigError: as `revise`.
        """
        try:
            with self._transaction():
                before = self.get(pair_id)
                changes = change(before)
                for name in changes:
                    checks.choice("field", name, tuple(field for field in FIELDS if field != "id"))
                after = replace(before, **changes)
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
        """Return the states of a pair before each of its revisions, oldest first."""
        rows = self._rows("SELECT before FROM revisions WHERE pair = ? ORDER BY id", pair_id)
        return [json.loads(before) for (before,) in rows]

    def search(self, text: str, limit: int = 20) -> list[Preference]:
        """Return up to `limit` pairs that contain all words of `text`, newest first.

        A word with Chinese, Japanese, Thai or similar characters is found within other text.
        """
        checks.text("text", text)
        checks.whole("limit", limit, least=1, most=MAX_ID)
        parts = [word for word in text.split() if UNSPACED.search(word)]
        words = [word for word in text.split() if not UNSPACED.search(word)]
        conditions = ["TRUE"]
        values: list[str] = []
        if words:
            conditions.append("words MATCH ?")
            values.append(" ".join('"' + word.replace('"', '""') + '"' for word in words))
        if parts:
            conditions.append(CONTAINS_ALL)
            values.append(json.dumps(parts))
        where = " AND ".join(conditions)  # only constants; user input is in `values`
        found = f"SELECT rowid FROM words WHERE {where}"  # noqa: S608
        rows = self._rows(
            f"SELECT * FROM shown WHERE id IN ({found} ORDER BY rowid DESC LIMIT ?) "  # noqa: S608
            "ORDER BY id DESC",
            *values,
            limit,
        )
        return [Preference.of(row) for row in rows]

    def set_eval_share(self, share: float) -> None:
        """Set the share of prompts held out for evaluation; `ConfigError` outside [0, 1)."""
        checks.number("share", share, least=0, below=1)
        with self._transaction():
            self._db.execute("UPDATE settings SET value = ? WHERE name = 'eval_share'", (share,))

    def pairs(self, split: Split | None = None) -> Iterator[Preference]:
        """Yield the pairs of a split (None: all pairs), ordered by id."""
        checks.optional(partial(checks.choice, valid=get_args(Split)))("split", split)
        share = self._one("SELECT value FROM settings WHERE name = 'eval_share'")
        low, high = {None: (0.0, 1.0), "train": (share, 1.0), "eval": (0.0, share)}[split]
        rows = self._rows("SELECT * FROM shown WHERE lot >= ? AND lot < ? ORDER BY id", low, high)
        yield from map(Preference.of, rows)

    def statistics(self) -> Statistics:
        """Return the statistics of the database."""
        share = self._one("SELECT value FROM settings WHERE name = 'eval_share'")
        pairs = self._one("SELECT count(*) FROM pairs")
        held = self._one("SELECT count(*) FROM pairs WHERE lot < ?", share)
        labels = (
            "SELECT value, count(*) FROM pairs, json_each(labels) GROUP BY 1 ORDER BY 2 DESC, 1"
        )
        agreement = (
            "SELECT judge.key, avg((sign(json_extract(judge.value, '$[0]') - "
            "json_extract(judge.value, '$[1]')) + 1) / 2.0) "
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
            result = self._db.execute("PRAGMA integrity_check").fetchone()[0]
            if result != "ok":
                raise sqlite3.DatabaseError(result)
            self._db.execute("INSERT INTO words (words) VALUES ('integrity-check')")

    def _is_new(self) -> bool:
        return self._one("SELECT count(*) FROM sqlite_master") == 0

    def _create(self) -> None:
        with self._transaction():
            if self._is_new():  # another process may have been first
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
            raise DatabaseFailedError(
                f"{self.path} cannot be used as a preference database ({error}); "
                "name another file, or restore a copy."
            ) from error
