"""Run fuzzers for a given time: `make fuzz SECONDS=600 TARGET=pack`; without a target, all in turn.

A case must be accepted, or refused with an error of `deepseek.errors`. Anything else is a finding,
as is a case that takes more than `CASE_SECONDS` of processor time or `CASE_BYTES` of memory.
Findings are shrunk and printed with the seed of their round, and the exit code is 1.
"""

import argparse
import resource
import tempfile
import time
import traceback
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.targets import TARGETS, Fuzzer
from hypothesis import HealthCheck, Phase, given, seed, settings

from deepseek.errors import UserError

CASE_SECONDS = 5.0
CASE_BYTES = 1 << 30
ROUND = 200
"""Cases per round; each round starts Hypothesis with another seed."""


@dataclass
class Tally:
    """Counts of a run."""

    cases: int = 0
    refused: int = 0
    slowest: float = 0.0


def check(fuzzer: Fuzzer, case: Any, tally: Tally) -> None:
    """Run one case; raise if it is a finding."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    try:
        fuzzer.run(case)
    except UserError as error:
        tally.refused += 1
        assert str(error).isprintable(), f"a message is not printable: {error!r}"
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    tally.cases += 1
    tally.slowest = max(tally.slowest, seconds)
    assert seconds < CASE_SECONDS, f"{seconds:.1f} s of processor time"
    assert grown < CASE_BYTES, f"{grown >> 20} MiB of memory"


def fuzz_round(fuzzer: Fuzzer, start: int, cases: int, tally: Tally) -> None:
    """Run `cases` cases from one seed; raise the first finding, shrunk."""

    @seed(start)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzzer.cases)
    def run(case: Any) -> None:
        check(fuzzer, case, tally)

    run()


def fuzz(name: str, seconds: float, start: int = 0) -> tuple[Tally, list[str]]:
    """Run one target for a given time; return its counts, and its findings as tracebacks."""
    tally = Tally()
    findings: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fuzzer = TARGETS[name](folder, stack)
        end = time.monotonic() + seconds
        while time.monotonic() < end and len(findings) < 20:
            try:
                fuzz_round(fuzzer, start, ROUND, tally)
            except Exception:
                findings.append(f"{name}, seed {start}:\n{traceback.format_exc()}")
            start += 1
    return tally, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    found = 0
    for name in arguments.target or TARGETS:
        tally, findings = fuzz(name, arguments.seconds, arguments.seed)
        found += len(findings)
        for finding in findings:
            print(finding, flush=True)
        print(
            f"{name}: {tally.cases} cases, {tally.refused} refused, slowest {tally.slowest:.2f} s, "
            f"{len(findings)} findings",
            flush=True,
        )
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
