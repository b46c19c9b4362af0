"""A short run of each fuzzer; `make fuzz` runs them for longer."""

from contextlib import ExitStack
from pathlib import Path

import fuzz.run
import pytest
from fuzz.run import Tally, check, fuzz_round
from fuzz.targets import TARGETS, Fuzzer
from hypothesis import strategies as st

CASES = {"jsonl": 150, "preferences": 150, "pack": 100}


@pytest.mark.parametrize("name", TARGETS)
def test_only_documented_errors(name: str, tmp_path: Path) -> None:
    tally = Tally()
    with ExitStack() as stack:
        fuzz_round(TARGETS[name](tmp_path, stack), 0, CASES.get(name, 50), tally)
    assert tally.refused > 0, "no case was refused: nothing was changed"
    assert tally.refused < tally.cases, "all cases were refused: the seeds are not valid"


def test_a_fuzzer_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(case: int) -> None:
        raise IndexError(case)

    with pytest.raises(IndexError):
        check(Fuzzer(st.integers(), crash), 0, Tally())

    def slow(case: int) -> None:
        sum(range(10**6))

    monkeypatch.setattr(fuzz.run, "CASE_SECONDS", 1e-4)
    with pytest.raises(AssertionError, match="processor time"):
        check(Fuzzer(st.integers(), slow), 0, Tally())
