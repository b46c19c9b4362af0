"""Values for property tests: what a caller may pass by mistake for any parameter."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import UserError

NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**40, 10**5000]),
    st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.5, 1e-320, 1e308, math.nan, math.inf, -math.inf]),
    st.sampled_from([True, False, 1j, np.int64(3), np.float32("nan"), np.bool_(True)]),
    st.integers(-5, 5),
    st.floats(),
)

TEXTS = st.one_of(
    st.sampled_from(["", "auto", "all", "none", "\ud800", "a\0b", "../..", "\x1b[31m", "x" * 5000]),
    st.text(max_size=6),
)


def tensors() -> list[torch.Tensor]:
    """Return tensors of odd shapes, dtypes, devices and values."""
    return [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(2, 0, 4),
        torch.zeros(2, 5, 4),
        torch.zeros(5, 4, dtype=torch.int64),
        torch.full((2, 5), -1),
        torch.full((2, 5), 10**12),
        torch.ones(2, 5, dtype=torch.bool),
        torch.zeros(2, 5, dtype=torch.complex64),
        torch.full((5, 4), math.nan),
        torch.full((1, 2, 5, 16), math.inf),
        torch.zeros(1, 2, 5, 16, dtype=torch.float16),
        torch.zeros(2, 5, 4, device="meta"),
    ]


OBJECTS = st.one_of(
    st.sampled_from([None, object(), object, b"x", set(), print, np.zeros(3), np.zeros(())]),
    st.sampled_from([[], [None], {}, {"a": 1}, {1: 2}, (1, 2), ["a", 1], [[1]], [[]], [True]]),
    st.sampled_from([[-1], [10**9], [math.nan], {"a": math.nan}, {"text": {"weight": True}}]),
)

JUNK = st.one_of(NUMBERS, TEXTS, OBJECTS, st.builds(lambda i: tensors()[i], st.integers(0, 12)))


@dataclass(frozen=True)
class Target:
    """A public constructor or function.

    Attributes:
        name: its public name.
        call: takes its arguments by name.
        valid: values that it must accept, by argument.
        cases: number of calls.
    """

    name: str
    call: Any
    valid: dict[str, st.SearchStrategy[Any]]
    cases: int = 60


def check_target(target: Target, scale: float = 1.0) -> None:
    """Call a target with valid values, and with up to two arguments replaced by others.

    Valid values must work. Others must work or raise an error of `deepseek.errors` whose message is
    one printable line.
    """

    @settings(max_examples=max(1, round(target.cases * scale)), deadline=None, database=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        names = sorted(target.valid)
        wrong = data.draw(st.sets(st.sampled_from(names), max_size=2))
        arguments = {
            name: data.draw(JUNK if name in wrong else values)
            for name, values in target.valid.items()
        }
        try:
            target.call(**arguments)
        except UserError as error:
            message = str(error)
            assert wrong, f"valid arguments are refused: {message}"
            assert message.isprintable() and message.endswith("."), message
            assert len(message) < 1000, message[:1000]

    run()
