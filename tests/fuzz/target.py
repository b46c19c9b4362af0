"""Definition of a fuzz target, and helpers for several of them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Run = Callable[[Any], object]


@dataclass(frozen=True)
class Fuzzer:
    """A target.

    Attributes:
        cases: strategy of its inputs.
        run: takes one input; a `UserError` is a refusal, any other exception a finding.
    """

    cases: st.SearchStrategy[Any]
    run: Run


def on_file(path: Path, read: Run) -> Run:
    """Return a function that writes its input to a file and reads that file."""

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return run


def as_json(value: Any) -> str:
    """Return JSON; NaN and lone surrogates are kept as they are."""
    return json.dumps(value, ensure_ascii=False)


def lossless(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def lossy(data: bytes) -> str:
    return data.decode("utf-8", "replace")
