"""Position automata (Glushkov 1961) of a grammar's terminals.

A position is a character's place in a terminal. The characters that match there are stored as the
set of their first UTF-8 bytes, as the bits of an integer, because llguidance's lexer reads bytes.
"""

from collections.abc import Iterable, Iterator

from deepseek.engine.gbnf_tree import LAST_CHARACTER, Alt, Chars, Node, Ranges, Repeat, Seq


class TooMuchWorkError(Exception):
    """The work on one grammar exceeds its limit."""


class Budget:
    """A limit on work.

    Args:
        steps: number of steps that may be taken.
    """

    def __init__(self, steps: int) -> None:
        self._left = steps

    def spend(self, steps: int = 1) -> None:
        """Use up steps.

        Raises:
            TooMuchWorkError: fewer are left.
        """
        self._left -= steps
        if self._left < 0:
            raise TooMuchWorkError


class Automaton:
    """The positions of a terminal, and which one can come after which.

    Args:
        body: the terminal, without references.
        budget: limit on the work.

    Attributes:
        bytes: first bytes that match at each position.
        first: positions at which a text can begin.
        last: positions at which a text can end.
        next: positions that can come after each.
    """

    def __init__(self, body: Node, budget: Budget) -> None:
        self.bytes: list[int] = []
        self.next: list[set[int]] = []
        self._budget = budget
        self.first, self.last, _ = self._add(body)

    @property
    def begin(self) -> int:
        """First bytes with which a text can begin."""
        return union(self.bytes[place] for place in self.first)

    def _add(self, node: Node) -> tuple[set[int], set[int], bool]:
        """Add the positions of a node; return its first and last ones, and whether it matches the
        empty text.
        """
        match node:
            case Chars():
                place = len(self.bytes)
                self.bytes.append(first_bytes(node))
                self.next.append(set())
                return {place}, {place}, False
            case Alt(parts):
                added = [self._add(part) for part in parts]
                first = set().union(*(begun for begun, _, _ in added))
                last = set().union(*(ended for _, ended, _ in added))
                return first, last, any(empty for _, _, empty in added)
            case Repeat(part, least, most):
                first, last, empty = self._add(part)
                if most != 1:  # a bounded repetition is treated as unbounded
                    self._link(last, first)
                return first, last, empty or least == 0
            case Seq(parts):
                return self._row(parts)
        raise AssertionError("a reference has no positions")

    def _row(self, parts: tuple[Node, ...]) -> tuple[set[int], set[int], bool]:
        first: set[int] = set()
        last: set[int] = set()
        empty = True
        for part in parts:
            part_first, part_last, part_empty = self._add(part)
            self._link(last, part_first)
            first = first | part_first if empty else first
            last = last | part_last if part_empty else part_last
            empty = empty and part_empty
        return first, last, empty

    def _link(self, before: set[int], after: set[int]) -> None:
        self._budget.spend(1 + len(before) * len(after))
        for place in before:
            self.next[place] |= after


def overtakes(longer: Automaton, shorter: Automaton, after: int, budget: Budget) -> bool:
    """Return whether a lexer that looks for the longest text can miss the end of a terminal.

    It can if a text of `shorter`, and a byte that may follow it, begin a text of `longer`.

    Args:
        longer: another terminal, or the same.
        shorter: the terminal.
        after: the bytes that may follow it.
        budget: limit on the work.
    """
    reached = list(_matching(shorter, shorter.first, longer, longer.first))
    seen = set(reached)
    while reached:
        mine, its = reached.pop()
        budget.spend(1 + len(shorter.next[mine]) * len(longer.next[its]))
        if mine in shorter.last and any(longer.bytes[n] & after for n in longer.next[its]):
            return True
        for pair in _matching(shorter, shorter.next[mine], longer, longer.next[its]):
            if pair not in seen:
                seen.add(pair)
                reached.append(pair)
    return False


def _matching(
    one: Automaton, places: set[int], other: Automaton, its_places: set[int]
) -> Iterator[tuple[int, int]]:
    """Yield the pairs of positions that match a common byte."""
    for mine in places:
        for its in its_places:
            if one.bytes[mine] & other.bytes[its]:
                yield mine, its


def first_bytes(chars: Chars) -> int:
    """Return the first bytes of some characters, as bits."""
    ranges = _complement(chars.ranges) if chars.negated else chars.ranges
    return union((1 << (lead_byte(last) + 1)) - (1 << lead_byte(first)) for first, last in ranges)


def lead_byte(code: int) -> int:
    """Return the first byte of a character in UTF-8; it never decreases with the code point."""
    if code < 0x80:
        return code
    if code < 0x800:
        return 0xC0 | code >> 6
    return 0xE0 | code >> 12 if code < 0x10000 else 0xF0 | code >> 18


def union(sets: Iterable[int]) -> int:
    """Return the union of sets of bytes."""
    found = 0
    for each in sets:
        found |= each
    return found


def _complement(ranges: Ranges) -> Ranges:
    """Return the characters that are in none of some ranges."""
    gaps: list[tuple[int, int]] = []
    free = 0
    for first, last in sorted(ranges):
        if first > free:
            gaps.append((free, first - 1))
        free = max(free, last + 1)
    return (*gaps, (free, LAST_CHARACTER)) if free <= LAST_CHARACTER else tuple(gaps)
