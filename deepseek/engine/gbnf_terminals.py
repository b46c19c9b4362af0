"""Write a grammar's rules in Lark syntax with terminals that are as long as possible.

llguidance walks all tokens of the vocabulary for a mask. Within a terminal it follows an automaton,
between two it runs a parser, which costs far more, so that a terminal for each character
(`by_character`, the reference) makes masks slow. But its lexer takes the longest match: in
`letters "x"` with `letters ::= [a-z]+` as a terminal, the last "x" would be swallowed, and the
grammar would never complete. llguidance's own converter joins characters all the same.

So parts without recursion are joined here, and split again where the longest match could be the
wrong one: where a text of one terminal, and a byte that may follow it, begin a text of any
terminal. The sets FIRST and FOLLOW (Aho, Sethi, Ullman 1986, section 4.4) say what may follow.
Splitting without need costs time, but never changes which texts match.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache, partial

from deepseek.engine.gbnf_automaton import Automaton, Budget, TooMuchWorkError, overtakes, union
from deepseek.engine.gbnf_tree import (
    EMPTY,
    Alt,
    Call,
    Chars,
    Node,
    Repeat,
    Seq,
    Terminal,
    called,
    expression,
    impossible,
    nullable,
    size,
    times,
    without_empty,
)

MAX_NODES = 300
"""Maximum number of nodes of a terminal; a larger part is left in pieces."""

WORK = 100_000
"""Maximum number of steps for one grammar, about a tenth of a second."""

Rules = dict[str, Node]


def by_character(rules: Rules, root: str) -> str:
    """Return rules in Lark syntax with a terminal for each character.

    Args:
        rules: the rules by name.
        root: name of the first rule.
    """
    return written({name: _apart(body) for name, body in reachable(rules, root).items()}, root)


def joined(rules: Rules, root: str) -> str:
    """Return rules in Lark syntax with long terminals, or like `by_character` if that takes too
    much work. Args: see there.
    """
    budget = Budget(WORK)
    automaton = cache(partial(Automaton, budget=budget))
    try:
        joiner = _Joiner(rules, budget)
        outer = reachable({name: joiner.join(body) for name, body in rules.items()}, root)
        while wrong := conflicts(outer, automaton, budget):
            outer = {name: _split(body, wrong) for name, body in outer.items()}
    except TooMuchWorkError:
        return by_character(rules, root)
    return written(outer, root)


def reachable(rules: Rules, root: str) -> Rules:
    """Return the rules that are used, the root first."""
    found = {root: rules[root]}
    new = [root]
    while new:
        names = {name: rules[name] for name in called(rules[new.pop()]) if name not in found}
        new += names
        found |= names
    return found


def written(rules: Rules, root: str) -> str:
    """Return rules of terminals in Lark syntax.

    They are renamed to r0, r1 and so on, because Lark allows other names than GBNF.
    """
    numbers = {name: f"r{number}" for number, name in enumerate(rules)}
    lines = [f"{numbers[name]}: {_lark(body, numbers)}" for name, body in rules.items()]
    return "\n".join([f"start: {numbers[root]}", *lines])


def _lark(node: Node, numbers: dict[str, str]) -> str:
    """Return a node in Lark syntax; `numbers` are the names of the rules there."""
    match node:
        case Terminal(body):
            return f"/{expression(body)}/"
        case Call(name):
            return numbers[name]
        case Seq(parts):
            row = " ".join(_lark(part, numbers) for part in parts)
            return f"({row})" if row else '""'
        case Alt(parts):
            return f"({' | '.join(_lark(part, numbers) for part in parts)})"
        case Repeat(part):
            return f"({_lark(part, numbers)}){times(node)}"
    raise AssertionError("a character outside of a terminal")


def terminal(node: Node) -> Node:
    """Return a node without references as a terminal, or an optional one."""
    body = without_empty(node)
    if not nullable(node):
        return Terminal(body)
    return EMPTY if impossible(body) else Repeat(Terminal(body), 0, 1)


def _apart(node: Node) -> Node:
    """Return a node with a terminal for each character."""
    return node if isinstance(node, Call) else _with_parts(node, _apart)


def _with_parts(node: Node, change: Callable[[Node], Node]) -> Node:
    """Return a node with its parts changed; a character becomes a terminal."""
    match node:
        case Seq(parts):
            return Seq(tuple(map(change, parts)))
        case Alt(parts):
            return Alt(tuple(map(change, parts)))
        case Repeat(part, least, most):
            return Repeat(change(part), least, most)
        case Chars():
            return Terminal(node)
    return node


def _split(node: Node, wrong: set[Node]) -> Node:
    """Return a node in which terminals with a body in `wrong` are split by one level."""
    if isinstance(node, Terminal):
        return _with_parts(node.body, terminal) if node.body in wrong else node
    return _with_parts(node, lambda part: _split(part, wrong))


class _Joiner:
    """Makes terminals of the parts without recursion.

    Args:
        rules: the grammar's rules by name.
        budget: limit on the work.
    """

    def __init__(self, rules: Rules, budget: Budget) -> None:
        self._rules = rules
        self._sizes: dict[str, int] = {}  # of rules without recursion, references replaced
        found = True
        while found:
            found = False
            for name in (*rules, *reversed(rules)):
                budget.spend()
                count = self._size(rules[name]) if name not in self._sizes else MAX_NODES + 1
                if count <= MAX_NODES:
                    self._sizes[name] = count
                    found = True

    def join(self, node: Node) -> Node:
        """Return a node with terminals, as long as possible."""
        if self._size(node) <= MAX_NODES:
            return terminal(self._replaced(node))
        match node:
            case Seq(parts):
                return Seq(tuple(map(self._joined, self._runs(parts))))
            case Alt(parts):
                alone = [part for part in parts if self._size(part) > MAX_NODES]
                rest = [part for part in parts if self._size(part) <= MAX_NODES]
                groups = [self._joined(run, Alt) for run in self._runs(rest)]
                return Alt((*groups, *map(self.join, alone)))
        return _with_parts(node, self.join)

    def _joined(self, run: list[Node], kind: type[Seq] | type[Alt] = Seq) -> Node:
        return self.join(run[0] if len(run) == 1 else kind(tuple(run)))

    def _runs(self, parts: Iterable[Node]) -> list[list[Node]]:
        """Return parts in groups that are small enough for a terminal, or single."""
        runs: list[list[Node]] = []
        room = 0
        for part in parts:
            count = self._size(part)
            room -= count
            if room >= 0:
                runs[-1].append(part)
            else:
                runs.append([part])
                room = MAX_NODES - 1 - count
        return runs

    def _size(self, node: Node) -> int:
        """Return the number of nodes with references replaced; above `MAX_NODES` if recursive."""
        names = list(called(node))
        return size(node) + sum(self._sizes.get(name, MAX_NODES + 1) for name in names)

    def _replaced(self, node: Node) -> Node:
        """Return a node with references replaced by their rules."""
        if isinstance(node, Call):
            return self._replaced(self._rules[node.name])
        return node if isinstance(node, Chars) else _with_parts(node, self._replaced)


def conflicts(rules: Rules, automaton: Callable[[Node], Automaton], budget: Budget) -> set[Node]:
    """Return the bodies of the terminals whose longest match could be the wrong one.

    Args:
        rules: rules of terminals by name.
        automaton: returns the automaton of a terminal's body.
        budget: limit on the work.
    """
    following = _Following(rules, automaton, budget).of
    ends = [(automaton(body), after) for body, after in following.items()]
    long = {body: automaton(body) for body in following if any(automaton(body).next)}
    wrong: set[Node] = set()
    for body, longer in long.items():
        budget.spend(len(ends))
        if any(overtakes(longer, shorter, after, budget) for shorter, after in ends):
            wrong.add(body)
    return wrong


class _Following:
    """The FOLLOW sets of terminals.

    Args:
        rules, automaton, budget: see `conflicts`.

    Attributes:
        of: first bytes of what may follow a terminal, by its body.
    """

    def __init__(
        self, rules: Rules, automaton: Callable[[Node], Automaton], budget: Budget
    ) -> None:
        self.of: dict[Node, int] = defaultdict(int)
        self._automaton = automaton
        self._begin = dict.fromkeys(rules, (0, False))
        self._after = dict.fromkeys(rules, 0)
        # Callers come first, so that one pass each way is enough for most grammars.
        before = None
        while before != self._begin:
            budget.spend(len(rules))
            before = dict(self._begin)
            for name in reversed(rules):
                self._begin[name] = self._begin_of(rules[name])
        ended = None
        while ended != self._after:
            budget.spend(len(rules))
            ended = dict(self._after)
            for name, body in rules.items():
                self._walk(body, self._after[name])

    def _begin_of(self, node: Node) -> tuple[int, bool]:
        """Return the first bytes of a node's texts, and whether the empty text is one."""
        match node:
            case Terminal(body):
                return self._automaton(body).begin, False
            case Call(name):
                return self._begin[name]
            case Repeat(part, least):
                first, empty = self._begin_of(part)
                return first, empty or least == 0
            case Alt(parts):
                begun = list(map(self._begin_of, parts))
                return union(first for first, _ in begun), any(empty for _, empty in begun)
            case Seq(parts):
                return self._begin_of_row(parts)
        raise AssertionError("a character outside of a terminal")

    def _begin_of_row(self, parts: Iterable[Node]) -> tuple[int, bool]:
        first = 0
        for part in parts:
            part_first, empty = self._begin_of(part)
            first |= part_first
            if not empty:
                return first, False
        return first, True

    def _walk(self, node: Node, after: int) -> None:
        """Note what follows the terminals and references of a node.

        Args:
            node: the node.
            after: first bytes of what may follow it.
        """
        match node:
            case Terminal(body):
                self.of[body] |= after
            case Call(name):
                self._after[name] |= after
            case Alt(parts):
                for part in parts:
                    self._walk(part, after)
            case Repeat(part, _, most):
                again = self._begin_of(part)[0] if most != 1 else 0
                self._walk(part, after | again)
            case Seq(parts):
                for part in reversed(parts):
                    self._walk(part, after)
                    first, empty = self._begin_of(part)
                    after = first | after if empty else first
