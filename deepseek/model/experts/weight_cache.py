"""Which weights of plugged experts are in memory, within a budget of bytes."""

import threading
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

from deepseek.errors import ConfigError


class Expert(Protocol):
    """An object with weights: an expert module."""

    name: str


class Form(Protocol):
    """The weights of an expert as a runner computes with them."""

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""


E = TypeVar("E", bound=Expert)
F = TypeVar("F", bound=Form)

Sizes = Mapping[E, int]
"""Experts whose weights are read when needed -> bytes that a sequence needs for them."""

Forms = dict[Callable[..., Form], Form]
"""Function that makes a form -> the form."""


class WeightCache:
    """A cache of expert weights that are read from their pack files when they are needed.

    The least recently used are evicted when others need their memory, except those that running
    requests have reserved. All methods are thread-safe.

    Args:
        limit: budget in bytes; None: experts stay in memory, and this cache stays empty.

    Attributes:
        limit: as passed. A change applies to experts that are plugged later.
        loads: number of times that an expert's weights were read.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.loads = 0
        self._lock = threading.RLock()
        # From the least to the most recently used. Weak: the forms of an unplugged expert are freed
        # with its last sequence.
        self._forms: WeakKeyDictionary[Expert, Forms] = WeakKeyDictionary()
        self._reserved: Counter[tuple[Expert, int]] = Counter()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        with self._lock:
            return sum(form.nbytes for _, _, form in self._items())

    @property
    def reserved_bytes(self) -> int:
        """Bytes that running sequences have reserved."""
        with self._lock:
            return sum(nbytes for _, nbytes in self._reserved)

    def get(self, module: E, make: Callable[[E], F]) -> F:
        """Return the weights of an expert in one form, from memory if they are there.

        Args:
            module: the expert.
            make: reads the weights in this form.

        Raises:
            ConfigError: there is no memory for them.
            PackError: the expert's file was changed.
        """
        form = self.peek(module, make)
        made = make(module) if form is None else form  # outside the lock, because it is slow
        with self._lock:
            if self.peek(module, make) is None:
                self.loads += form is None
                self._free(made.nbytes, module.name, making=module)
            forms = self._forms.pop(module, {})
            forms[make] = forms.pop(make, made)
            self._forms[module] = forms  # reinserted, so that it is the most recently used
            return cast(F, forms[make])

    def peek(self, module: E, make: Callable[[E], F]) -> F | None:
        """Return the weights of an expert in one form if they are in memory, else None."""
        with self._lock:
            return cast(F | None, self._forms.get(module, {}).get(make))

    def check(self, sizes: Sizes[E]) -> None:
        """Raise `ConfigError` if a sequence needs more memory for its experts than the budget."""
        total = sum(sizes.values())
        if self.limit is not None and total > self.limit:
            raise ConfigError(_too_large([module.name for module in sizes], total, self.limit))

    def fitting(
        self, names: Sequence[str], needed: Container[str], sizes: Mapping[str, int]
    ) -> tuple[str, ...]:
        """Return those of the experts that fit into the budget together.

        Args:
            names: the experts, in the order of preference.
            needed: experts that are returned in any case.
            sizes: bytes of each expert; those that are missing are in memory anyway.
        """
        if self.limit is None:
            return tuple(names)
        left = self.limit - sum(nbytes for name, nbytes in sizes.items() if name in needed)
        fitting = []
        for name in names:
            if name not in needed:
                if sizes.get(name, 0) > left:
                    continue
                left -= sizes.get(name, 0)
            fitting.append(name)
        return tuple(fitting)

    def reserve(self, sizes: Sizes[E]) -> bool:
        """Reserve memory for the experts of a sequence, evicting others if needed.

        Args:
            sizes: bytes of each expert, as `check` accepts them.

        Returns:
            Whether it fits beside what others have reserved; if not, nothing has changed.
        """
        with self._lock:
            reserved = {*self._reserved, *sizes.items()}
            if self.limit is None or not sizes:
                return True
            if sum(nbytes for _, nbytes in reserved) > self.limit:
                return False
            self._reserved.update(sizes.items())
            missing = reserved - {(module, form.nbytes) for module, _, form in self._items()}
            self._free(sum(nbytes for _, nbytes in missing), "")
            return True

    def release(self, sizes: Sizes[E]) -> None:
        """Release the memory that `reserve` has reserved."""
        with self._lock:
            self._reserved -= Counter(dict.fromkeys(sizes.items(), 1))

    def _items(self) -> list[tuple[Expert, Callable[..., Form], Form]]:
        """Return all weights in memory, the least recently used first."""
        items = []
        for module, forms in self._forms.items():
            items += [(module, make, form) for make, form in forms.items()]
        return items

    def _free(self, nbytes: int, name: str, making: Expert | None = None) -> None:
        """Evict the least recently used forms until `nbytes` more bytes fit into the budget.

        Args:
            nbytes: number of bytes.
            name: name of the expert, for the error message.
            making: expert whose form of this size is being made; None: none.

        Raises:
            ConfigError: they do not fit beside what is reserved.
        """
        if self.limit is None:
            return
        left = self.limit - self.nbytes
        items = self._items()
        # Of an expert's forms of one size, a reservation keeps one: the latest, or the one that is
        # being made.
        latest = {(module, form.nbytes): make for module, make, form in items}
        held = self._reserved.keys() - {(making, nbytes)}
        for module, make, form in items:
            if left >= nbytes:
                return
            key = (module, form.nbytes)
            if key not in held or latest[key] != make:
                del self._forms[module][make]
                left += form.nbytes
        if left < nbytes:
            raise ConfigError(_too_large([name], nbytes, left))


def _too_large(names: list[str], needed: int, limit: int) -> str:
    """Return the message that the weights of experts do not fit."""
    names = sorted(names)
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"The weights of {listed} need {needed} bytes of memory at once, but the budget of experts "
        f"has {limit}; ask for fewer experts, or give the server a larger --expert-gib."
    )
