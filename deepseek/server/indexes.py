"""Retrieval indexes of the experts folder, loaded on first use."""

import threading
from dataclasses import dataclass
from pathlib import Path

from deepseek.packs.library import index_folder
from deepseek.retrieval.index import Index


@dataclass(frozen=True)
class Stored:
    """A loaded index, and the modification time (ns) of its files when it was read."""

    index: Index
    changed: int


class Indexes:
    """Indexes of one folder, loaded on first use and reloaded when their files change.

    It is thread-safe.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored: dict[str, Stored] = {}
        self._lock = threading.Lock()

    def find(self, name: str) -> Index | None:
        """Return the index of an expert, None if there is none.

        Raises:
            DataError: the index is damaged.
        """
        folder = index_folder(name, self._folder)
        with self._lock:
            # Compared with the listing, so that a client's name is never opened as a path.
            if folder not in self._folder.glob("*.index"):
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
