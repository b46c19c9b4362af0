"""The next token is chosen as asked; truncation is checked against `transformers`' own filters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deepseek.errors import ConfigError
from deepseek.infer.sampler import Sampler, Sampling, penalise, truncate


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 3


@given(seed=st.integers(0, 10_000), k=st.integers(1, 40))
def test_top_k_is_that_of_transformers(seed: int, k: int) -> None:
    logits = logits_of(seed)
    kept = truncate(logits.softmax(-1), Sampling(top_k=k)) > 0
    assert torch.equal(kept, TopKLogitsWarper(k)(None, logits[None])[0].isfinite())


@given(seed=st.integers(0, 10_000), p=st.floats(0.05, 0.99))
def test_top_p_is_that_of_transformers(seed: int, p: float) -> None:
    logits = logits_of(seed)
    kept = truncate(logits.softmax(-1), Sampling(top_p=p)) > 0
    assert torch.equal(kept, TopPLogitsWarper(p)(None, logits[None])[0].isfinite())


@given(seed=st.integers(0, 10_000), p=st.floats(0.01, 0.9))
def test_min_p_is_that_of_transformers(seed: int, p: float) -> None:
    logits = logits_of(seed)
    kept = truncate(logits.softmax(-1), Sampling(min_p=p)) > 0
    assert torch.equal(kept, MinPLogitsWarper(p)(None, logits[None])[0].isfinite())


@given(seed=st.integers(0, 10_000), penalty=st.floats(0.5, 2.0))
def test_repetition_penalty_is_that_of_transformers(seed: int, penalty: float) -> None:
    logits, seen = logits_of(seed), torch.tensor([3, 7, 7, 20])
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(seen[None], logits[None].clone())[0]
    torch.testing.assert_close(penalise(logits, seen, penalty), theirs)


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    drawn = torch.tensor([sampler.next_token(logits) for _ in range(6000)])
    torch.testing.assert_close(torch.bincount(drawn, minlength=3) / 6000, logits.softmax(-1), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("min_p", 1.0), ("max_new_tokens", 0),
        ("repetition_penalty", 0.0),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field}="):
        Sampling(**{field: value})
