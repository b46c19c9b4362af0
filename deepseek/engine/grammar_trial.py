"""Compile grammars of clients in another process first.

llguidance recurses over references, so that a chain of some thousands overflows the stack and ends
the process, and some short grammars take it a minute or gigabytes (`{"multipleOf": 999983}`). The
other process has limits of time, memory and stack; this module is also its program.
"""

import json
import os
import re
import resource
import select
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

import llguidance

TRIAL_SECONDS = 5.0
"""Time limit for compiling a grammar."""

START_SECONDS = 30.0
"""Time limit for the start of the other process."""

MEMORY = 2 << 30
"""Address space of the other process, in bytes."""

STACK = 4 << 20
"""Bytes of stack for compiling there; half of what threads have here."""


TOO_COMPLEX = "it is too complex"


class Trial:
    """Tries grammars in another process, one at a time; it is started when first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._kept = lru_cache(maxsize=256)(self._complaint)

    def complaint(self, lark: str) -> str:
        """Return why llguidance cannot compile a grammar; "" if it can.

        The answer is cached, except after a timeout, which may be due to a busy machine.
        """
        try:
            return self._kept(lark)
        except TimeoutError:
            return TOO_COMPLEX

    def _complaint(self, lark: str) -> str:
        """Compile a grammar in the other process.

        Raises:
            TimeoutError: that takes longer than `TRIAL_SECONDS`.
        """
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            process.stdin.write(json.dumps(lark) + "\n")
            process.stdin.flush()
            try:
                line = _line(process, TRIAL_SECONDS)
            except TimeoutError:
                self.stop()
                raise
            if not line:  # the stack or the memory is exhausted
                self.stop()
                return TOO_COMPLEX
            return str(json.loads(line))

    def _started(self) -> subprocess.Popen[str]:
        """Return the running process.

        Raises:
            GrammarCompilerError: it does not start; this is not cached.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                # Without -P the folder of this file is searched first. Otherwise the process finds
                # the same packages as this one, those of PYTHONPATH and of the user included.
                [sys.executable, "-P", str(Path(__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            try:
                line = _line(self._process, START_SECONDS)
            except TimeoutError:
                line = ""
            if not line:
                # The other process needs this module alone, and the package would load torch there.
                from deepseek.engine.request import GrammarCompilerError

                complaints = self.stop().strip().splitlines() or ["it gives no reason"]
                raise GrammarCompilerError(
                    f"The process that compiles grammars does not start ({complaints[-1]}); check "
                    "that `python -P -c 'import llguidance'` works in this environment."
                )
        return self._process

    def stop(self) -> str:
        """End the other process, and return what it wrote to its standard error while it started;
        the next grammar starts it again.
        """
        complaints = ""
        if self._process is not None:
            self._process.kill()
            _, complaints = self._process.communicate()
        self._process = None
        return complaints


def _line(process: subprocess.Popen[str], seconds: float) -> str:
    """Return the next line of a process; "" if it ended.

    Raises:
        TimeoutError: there is none within `seconds`.
    """
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    if not ready:
        raise TimeoutError
    return process.stdout.readline()


def in_one_line(complaint: str) -> str:
    """Return llguidance's complaint without the excerpts of the grammar below its first line, which
    show our translation; of a regular expression, the reason is below them.
    """
    first, _, below = complaint.strip().partition("\n")
    reason = re.search(r"^error: (.*)", below, re.MULTILINE)
    return first.removesuffix("regex parse error:") + reason[1] if reason else first


def answer_all() -> None:
    """Answer each grammar on standard input, a line of JSON, with a line of the same kind."""
    print(json.dumps("ready"), flush=True)
    tokens = llguidance.LLTokenizer("byte")
    for line in sys.stdin:
        matcher = llguidance.LLMatcher(tokens, json.loads(line), log_level=0)
        if not matcher.is_error():
            matcher.compute_logit_bias()
        print(json.dumps(in_one_line(matcher.get_error())), flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Nobody reads the pipe after the start, and panics of llguidance would fill it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    threading.stack_size(STACK)
    answering = threading.Thread(target=answer_all)
    answering.start()
    answering.join()
