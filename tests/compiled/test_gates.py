"""The compiled arbitration against the reference (`model/experts/gate.py`)."""

import math
from itertools import pairwise

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deepseek.compiled.expert_sites import arbitrate
from deepseek.model.experts import gate

# Mostly few distinct scores, so that ties are common.
DETECT = st.sampled_from([-0.5, 0.0, 2**-6, 0.125, 0.25, 1.0, 3.0]) | st.floats(-4, 4, width=32)
CONTRAST = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0]) | st.floats(-30, 30, width=32)
MEMBERS = st.lists(st.tuples(DETECT, CONTRAST), min_size=1, max_size=12)


def claim(detect: float, contrast: float) -> float:
    return contrast - math.log1p(math.exp(-gate.SHARPNESS * detect))


def separated(members: list[tuple[float, float]]) -> bool:
    """Whether claims that are not ties differ by more than rounding, which could change their
    order.
    """
    claims = sorted((claim(*member), member) for member in members if member[0] > 0)
    return all(one == other or other[0] - one[0] > 1e-4 for one, other in pairwise(claims))


def compiled(members: list[tuple[float, float]], max_experts: int) -> np.ndarray:
    count = len(members)
    detect, contrast = np.array(members, np.float32).T.copy()
    weights = np.full(count + 2, -1, np.float32)
    places = np.arange(count, dtype=np.int64)[::-1] + 1  # sites need not be in the order of members
    arbitrate(places, detect, contrast, max_experts, weights)
    assert weights[0] == weights[-1] == -1
    return weights[places]


@settings(max_examples=200, deadline=None)
@given(MEMBERS, st.integers(1, 6))
def test_compiled_arbitration_agrees_with_the_reference(
    members: list[tuple[float, float]], max_experts: int
) -> None:
    assume(separated(members))
    detect, contrast = torch.tensor(members).T
    expected = gate.arbitrate(detect[None, None], contrast[None, None], max_experts)[0, 0].numpy()
    weights = compiled(members, max_experts)
    assert ((weights > 0) == (expected > 0)).all()
    np.testing.assert_allclose(weights, expected, rtol=2e-5, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(DETECT, CONTRAST, st.integers(2, 12), st.integers(1, 6))
def test_of_members_that_tie_the_first_ones_are_kept(
    detect: float, contrast: float, count: int, max_experts: int
) -> None:
    weights = compiled([(detect, contrast)] * count, max_experts)
    kept = min(count, max_experts) if detect > 0 else 0
    assert (weights > 0).tolist() == [True] * kept + [False] * (count - kept)
