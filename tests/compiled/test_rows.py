"""Model checking of the barrier of `compiled/rows.py`: every interleaving of its threads' steps.

The model is the barrier's source, run in Python. A thread stops before each access to shared
memory, and any other thread may run next. Memory is sequentially consistent, and threads never
spin, which is one of the possible behaviours.
"""

import ast
import inspect
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator
from typing import Any, NamedTuple

import pytest

from deepseek.compiled import rows

COUNTER = 64  # an address
SLEEPERS = COUNTER + 8
SHARED = {"arrive", "look", "_syscall"}
SOURCE = inspect.getsource(rows.barrier.py_func)
Step = tuple[Any, ...]
Barrier = Callable[[int], Generator[Step, int, None]]


class Thread(NamedTuple):
    """A thread: barriers passed, results of its steps in the current one, and whether it sleeps."""

    passed: int = 0
    results: tuple[int, ...] = ()
    asleep: bool = False


class State(NamedTuple):
    """The barrier's two counters, and the threads."""

    counter: int
    sleepers: int
    threads: tuple[Thread, ...]


class Stops(ast.NodeTransformer):
    """Turns accesses to shared memory into yields of a generator."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in SHARED:
            return ast.Yield(ast.Tuple([ast.Constant(node.func.id), *node.args], ast.Load()))
        return node


def model_of(source: str, threads: int) -> Barrier:
    """Return the barrier as a generator that yields each access to shared memory."""
    tree = Stops().visit(ast.parse(source))
    tree.body[0].decorator_list = []
    names = vars(rows) | {"thread_count": lambda: threads, "SPINS": 0, "_FUTEX": 1}
    exec(compile(ast.fix_missing_locations(tree), "barrier", "exec"), names)
    return names["barrier"]


def next_step(barrier: Barrier, results: tuple[int, ...]) -> tuple[Step, Hashable] | None:
    """Return a thread's next step and its position in the barrier; None if it has left."""
    run = barrier(COUNTER)
    step = next(run)
    try:
        for result in results:
            step = run.send(result)
    except StopIteration:
        return None
    # The number of spins does not matter, and grows without bound.
    values = [(name, value) for name, value in run.gi_frame.f_locals.items() if name != "spins"]
    return step, (run.gi_frame.f_lasti, *values)


def successors(barrier: Barrier, state: State, rounds: int) -> Iterator[State]:
    """Yield the states reachable by one step of one thread."""
    for number, thread in enumerate(state.threads):
        if thread.asleep or thread.passed == rounds:
            continue
        stop = next_step(barrier, thread.results)
        assert stop is not None
        numbers = {COUNTER: state.counter, SLEEPERS: state.sleepers}
        threads = list(state.threads)
        result = 0
        asleep = False
        match stop[0]:
            case "arrive", int(address), int(amount):
                result = numbers[address]
                numbers[address] += amount
            case "look", int(address):
                result = numbers[address]
            case "_syscall", _, int(address), rows._WAIT, seen, *_:
                asleep = numbers[address] == seen
            case "_syscall", _, _, rows._WAKE, *_:
                threads = [other._replace(asleep=False) for other in threads]
        threads[number] = Thread(thread.passed, (*thread.results, result), asleep)
        if next_step(barrier, threads[number].results) is None:
            threads[number] = Thread(thread.passed + 1)
        yield State(*numbers.values(), tuple(threads))


def deadlock(source: str, threads: int, rounds: int) -> State | None:
    """Return a reachable state in which a thread sleeps forever; None if there is none.

    Args:
        source: source of the barrier.
        threads: number of threads.
        rounds: number of times that each calls the barrier.
    """
    barrier = model_of(source, threads)
    queue = deque([State(0, 0, (Thread(),) * threads)])
    known = set()
    while queue:
        state = queue.popleft()
        following = [*successors(barrier, state, rounds)]
        if not following and any(thread.passed < rounds for thread in state.threads):
            return state
        for other in following:
            assert all(other.counter >= t.passed * threads for t in other.threads), "left too early"
            places = [(t.passed, t.asleep, next_step(barrier, t.results)) for t in other.threads]
            key = (other.counter, other.sleepers, *places)
            if key not in known:
                known.add(key)
                queue.append(other)
    return None


@pytest.mark.parametrize(("threads", "rounds"), [(2, 2), (2, 3), (3, 2)])
def test_no_order_of_steps_leaves_a_thread_asleep(threads: int, rounds: int) -> None:
    assert deadlock(SOURCE, threads, rounds) is None


def test_the_model_finds_the_wake_up_that_was_lost() -> None:
    """In an earlier version the last thread to arrive subtracted the sleepers from the count, and
    could subtract one that slept in the next barrier.
    """
    wake = "        _syscall(_FUTEX, counter, _WAKE"
    counted_out = "            arrive(sleepers, -1)\n"
    assert wake in SOURCE and counted_out in SOURCE
    old = SOURCE.replace(wake, f"        arrive(sleepers, -look(sleepers))\n{wake}")
    stuck = deadlock(old.replace(counted_out, ""), threads=2, rounds=2)
    assert stuck is not None and any(thread.asleep for thread in stuck.threads)
