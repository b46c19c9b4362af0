"""A short run of each fuzzer; `make fuzz` runs them for longer."""

from contextlib import ExitStack
from pathlib import Path

import pytest
from fuzz.run import Tally, check, fuzz_round
from fuzz.targets import TARGETS, Fuzzer
from hypothesis import strategies as st

CASES = {"bodies": 60, "gguf": 60, "safetensors": 40, "templates": 60}


@pytest.mark.parametrize("name", TARGETS)
def test_only_documented_errors(name: str, tmp_path: Path) -> None:
    tally = Tally()
    with ExitStack() as stack:
        fuzz_round(TARGETS[name](tmp_path, stack), 0, CASES.get(name, 150), tally)
    assert tally.refused > 0, "no case was refused: nothing was changed"
    assert tally.refused < tally.cases, "all cases were refused: the seeds are not valid"


def test_a_fuzzer_sees_what_is_wrong() -> None:
    def crash(case: int) -> None:
        raise IndexError(case)

    with pytest.raises(IndexError):
        check(Fuzzer(st.integers(), crash), 0, Tally())

    def slow(case: int) -> None:
        sum(range(10**9))

    with pytest.raises(AssertionError, match="processor time"):
        check(Fuzzer(st.integers(), slow), 0, Tally())
