"""Sandbox for generated code: a subprocess with limits on time, memory and files, without network.

It guards against mistakes, not against attackers: the process runs as this user and can read the
user's files.
"""

import contextlib
import functools
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

LARGEST_FILE = 1 << 24
"""Maximum bytes per written file."""
OUTPUT = 2_000
"""Characters of output to keep, from its end."""

NO_NETWORK = ["unshare", "--user", "--map-root-user", "--net"]


@dataclass(frozen=True)
class ProgramResult:
    """Result of a program: whether it exited with code 0, whether it timed out, and its last
    output.
    """

    passed: bool
    timed_out: bool
    output: str


def run_program(source: str, seconds: float = 5.0, memory: int = 1 << 30) -> ProgramResult:
    """Run Python source in an empty temporary folder, without network if the system allows.

    Args:
        source: the program.
        seconds: limit of processor time and of wall time.
        memory: limit of the address space in bytes.
    """
    # Output goes to a file, whose size is limited; through a pipe, it could fill our memory.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output_file:
        path = Path(folder) / "program.py"
        path.write_text(source, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [*_isolation(), sys.executable, "-I", "-B", str(path)],
            cwd=folder,
            env={"PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=output_file,
            stderr=subprocess.STDOUT,
            preexec_fn=functools.partial(_limit, seconds, memory),  # noqa: PLW1509 - no thread holds a lock we need
            start_new_session=True,
        )
        try:
            process.wait(seconds)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _kill_group(process)
        process.wait()
        output_file.seek(max(0, output_file.seek(0, os.SEEK_END) - OUTPUT))
        output = output_file.read().decode(errors="replace")
    return ProgramResult(process.returncode == 0 and not timed_out, timed_out, output)


def _limit(seconds: float, memory: int) -> None:
    """Set the limits, in the new process before it executes the program."""
    whole_seconds = max(1, int(seconds + 0.999))
    for kind, limit in (
        (resource.RLIMIT_CPU, whole_seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(kind, (limit, limit))


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill the program and its child processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)


@functools.cache
def _isolation() -> list[str]:
    """Return the command prefix that disables the network; empty if the system has none."""
    if shutil.which("unshare") is None:
        return []
    probe = subprocess.run([*NO_NETWORK, "true"], capture_output=True, check=False)
    return NO_NETWORK if probe.returncode == 0 else []
