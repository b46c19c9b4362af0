"""Cache of the sites of recent batches, for batches with the same experts."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple
from weakref import ReferenceType, ref

from deepseek.compiled.weights import Sites
from deepseek.model.experts.armed import Roster

CAPACITY = 16  # maximum number of entries


class _Entry(NamedTuple):
    """Sites, and their rosters.

    The references are weak, so that experts are freed once they are unplugged and no sequence runs
    with them.
    """

    sites: Sites
    rosters: list[ReferenceType[Roster]]


class SitesCache:
    """Sites by their rosters; an entry is dropped when one of its rosters is freed.

    Args:
        layers: number of layers of the model.
        hidden: width D of the residual stream.
    """

    def __init__(self, layers: int, hidden: int) -> None:
        self._layers = layers
        self._hidden = hidden
        self._entries: dict[tuple[int, ...], _Entry] = {}

    def get(self, rosters: Sequence[Roster]) -> Sites:
        """Return the sites of the experts in some rosters, from the cache if possible."""
        distinct = {id(roster): roster for roster in rosters}
        key = tuple(sorted(distinct))
        entry = self._entries.get(key)
        if entry is None:
            if len(self._entries) >= CAPACITY:
                self._entries.clear()
            sites = Sites(list(distinct.values()), self._layers, self._hidden)
            forget = partial(_forget, ref(self), key)
            entry = _Entry(sites, [ref(roster, forget) for roster in distinct.values()])
            self._entries[key] = entry
        return entry.sites

    def drop_outdated(self) -> None:
        """Drop the sites with weights that are kept nowhere else."""
        # A copy, because a roster may be freed meanwhile, which drops its entries.
        for key, entry in self._entries.copy().items():
            if not entry.sites.is_current:
                self._entries.pop(key, None)


def _forget(cache: ReferenceType[SitesCache], key: tuple[int, ...], _: object) -> None:
    """Drop an entry when one of its rosters is freed, before another roster gets the same id.

    It runs in any thread, so it takes no lock.
    """
    live = cache()
    if live is not None:
        live._entries.pop(key, None)
