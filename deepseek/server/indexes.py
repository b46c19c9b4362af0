"""The retrieval indexes in the experts folder, in memory once they are asked for."""

import threading
from dataclasses import dataclass
from pathlib import Path

from deepseek.packs.library import index_folder
from deepseek.retrieval.index import Index


@dataclass(frozen=True)
class Stored:
    """An index in memory, and the state of its files when it was read."""

    index: Index
    changed: int


class Indexes:
    """The indexes in one folder, each read at its first use and again when it has changed. Any
    thread may ask.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored: dict[str, Stored] = {}
        self._lock = threading.Lock()

    def find(self, name: str) -> Index | None:
        """Return the index of an expert, None if there is none; raise `DataError` if it is
        damaged.
        """
        folder = index_folder(name, self._folder)
        with self._lock:
            if folder not in self._folder.glob(
                "*.index"
            ):  # a listing, so that no name becomes a path
                self._stored.pop(name, None)
                return None
            try:
                changed = (folder / "meta.json").stat().st_mtime_ns
            except OSError:
                changed = 0
            stored = self._stored.get(name)
            if stored is None or stored.changed != changed:
                stored = self._stored[name] = Stored(Index.load(folder), changed)
            return stored.index
