"""The sandbox: programs pass or fail correctly, and cannot run forever, use up memory, fill the
disk or reach the network.
"""

import pytest

from deepseek.evaluate.sandbox import OUTPUT, _isolation, run_program


def test_a_program_passes_by_its_exit_code() -> None:
    assert run_program("print(6 * 7)").output == "42\n"
    assert run_program("print(6 * 7)").passed
    failed = run_program("assert 1 == 2, 'no'")
    assert not failed.passed and "AssertionError: no" in failed.output


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import os, time\nif os.fork() == 0: time.sleep(60)\nelse: os.wait()",
    ],
)
def test_time_is_limited(source: str) -> None:
    outcome = run_program(source, seconds=1)
    assert not outcome.passed


def test_output_is_kept_from_its_end_and_limited() -> None:
    outcome = run_program("print('x' * 10**6); print('the end')")
    assert outcome.passed and outcome.output.endswith("the end\n")
    assert len(outcome.output) == OUTPUT
    assert not run_program("while True: print('x' * 10**6)").passed


def test_memory_and_files_are_limited() -> None:
    assert "MemoryError" in run_program("x = bytearray(1 << 31)").output
    assert not run_program("open('big', 'wb').write(bytes(1 << 25))").passed


def test_the_folder_is_temporary_and_there_is_no_network() -> None:
    assert run_program("import os; assert os.listdir() == ['program.py']").passed
    source = "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)"
    outcome = run_program(source)
    assert not outcome.passed
    # Without a network namespace the port is closed; with one there is not even a route.
    if _isolation():
        assert "unreachable" in outcome.output or "Cannot assign" in outcome.output
