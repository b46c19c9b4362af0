"""The budget of expert weights: reserved weights always fit, and the budget is never exceeded."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from deepseek.model.experts.weight_cache import WeightCache

LIMIT = 10


@dataclass(eq=False)
class Weighty:
    """An expert, and the bytes of each of its forms."""

    name: str
    nbytes: int


@dataclass
class Weights:
    """Weights of an expert in one form."""

    nbytes: int


def rows(expert: Weighty) -> Weights:
    return Weights(expert.nbytes)


def columns(expert: Weighty) -> Weights:
    return Weights(expert.nbytes)


EXPERTS = [Weighty(name, nbytes) for name, nbytes in (("a", 4), ("b", 6), ("c", 3), ("d", 10))]


@given(
    steps=st.lists(
        st.tuples(st.sets(st.integers(0, 3), min_size=1), st.sampled_from([rows, columns])),
        max_size=30,
    )
)
def test_sequences_of_any_runner_find_their_memory(steps: list[tuple[set[int], object]]) -> None:
    cache = WeightCache(LIMIT)
    running: list[dict[Weighty, int]] = []
    for chosen, make in steps:
        sizes = {EXPERTS[index]: EXPERTS[index].nbytes for index in sorted(chosen)}
        if not cache.reserve(sizes):
            before = cache.reserved_bytes
            assert before + sum(sizes.values()) > LIMIT
            for held in running:
                cache.release(held)
            running.clear()
            assert cache.reserved_bytes == 0
            continue
        running.append(sizes)
        for expert in {expert for held in running for expert in held}:
            assert cache.get(expert, make).nbytes == expert.nbytes  # type: ignore[arg-type]
            assert cache.nbytes <= LIMIT


def test_an_expert_in_two_forms_of_one_size_holds_one_place() -> None:
    a, b = EXPERTS[:2]
    cache = WeightCache(LIMIT)
    for make in (rows, columns):
        cache.get(a, make)
    assert cache.reserve({a: 4}) and cache.nbytes == 8
    assert cache.reserve({b: 6}) and cache.reserved_bytes == 10
    assert cache.peek(a, columns) is not None and cache.peek(a, rows) is None
    for make in (rows, columns):
        assert cache.get(a, make).nbytes == 4
        assert cache.get(b, make).nbytes == 6
        assert cache.nbytes == LIMIT
