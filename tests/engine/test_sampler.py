"""Sampling follows the request's options; truncation is checked against `transformers`' filters."""

from typing import Any

import numpy as np
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

from deepseek.engine.sampler import Sampler, Sampling, admitted, penalise
from deepseek.errors import ConfigError


def logits_of(seed: int, size: int = 40) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def kept(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return which tokens `admitted` admits."""
    ids = admitted(np.exp(logits.numpy()), sampling)
    return (
        torch.ones(len(logits), dtype=torch.bool)
        if ids is None
        else torch.zeros(len(logits), dtype=torch.bool).index_fill(0, torch.tensor(ids), True)
    )


@given(seed=st.integers(0, 10_000), k=st.integers(1, 40))
def test_top_k_is_that_of_transformers(seed: int, k: int) -> None:
    logits = logits_of(seed)
    ours = kept(logits, Sampling(top_k=k))
    assert torch.equal(ours, TopKLogitsWarper(k)(None, logits[None])[0].isfinite())


@given(seed=st.integers(0, 10_000), p=st.floats(0.05, 0.99))
def test_top_p_is_that_of_transformers(seed: int, p: float) -> None:
    logits = logits_of(seed)
    ours = kept(logits, Sampling(top_p=p))
    assert torch.equal(ours, TopPLogitsWarper(p)(None, logits[None])[0].isfinite())


@given(seed=st.integers(0, 10_000), p=st.floats(0.01, 0.9))
def test_min_p_is_that_of_transformers(seed: int, p: float) -> None:
    logits = logits_of(seed)
    ours = kept(logits, Sampling(min_p=p))
    assert torch.equal(ours, MinPLogitsWarper(p)(None, logits[None])[0].isfinite())


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 40),
    p=st.floats(0.05, 0.99),
    floor=st.floats(0.01, 0.9),
    size=st.sampled_from([40, 3001]),
)
def test_top_k_then_top_p_then_min_p_are_those_of_transformers(
    seed: int, k: int, p: float, floor: float, size: int
) -> None:
    logits = logits_of(seed, size)
    scores = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, logits[None]))
    ours = kept(logits, Sampling(top_k=k, top_p=p))
    assert torch.equal(ours, scores[0].isfinite())
    ours = kept(logits, Sampling(top_k=k, top_p=p, min_p=floor))
    assert torch.equal(ours, MinPLogitsWarper(floor)(None, scores)[0].isfinite())


@given(seed=st.integers(0, 10_000), penalty=st.floats(0.5, 2.0))
def test_repetition_penalty_is_that_of_transformers(seed: int, penalty: float) -> None:
    logits, seen = logits_of(seed), torch.tensor([3, 7, 7, 20])
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(seen[None], logits[None].clone())[0]
    torch.testing.assert_close(
        torch.tensor(penalise(logits.numpy(), seen.tolist(), penalty)), theirs
    )


def test_sampling_follows_the_probabilities() -> None:
    logits = np.array([0.0, 1.0, 2.0], np.float32)
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    drawn = torch.tensor([sampler.next_token(logits) for _ in range(6000)])
    torch.testing.assert_close(
        torch.bincount(drawn, minlength=3) / 6000,
        torch.tensor(logits).softmax(-1),
        atol=0.02,
        rtol=0,
    )


@given(
    seed=st.integers(0, 10_000),
    p=st.floats(0.05, 1.0),
    k=st.integers(0, 40),
    floor=st.floats(0.0, 0.5),
    size=st.sampled_from([40, 63, 64, 3001]),
    spread=st.sampled_from([0.1, 1, 3]),
)
def test_likely_tokens_alone_admit_what_sorting_all_admits(
    seed: int, p: float, k: int, floor: float, size: int, spread: float
) -> None:
    logits, sampling = (logits_of(seed, size) * spread, Sampling(top_p=p, top_k=k, min_p=floor))
    ordered, ids = logits.double().softmax(-1).sort(descending=True)
    ordered = ordered[: k or size]
    wanted = ordered >= floor * ordered[0]
    if p < 1.0:
        wanted &= ordered.cumsum(-1) - ordered < p * ordered.sum()
    assert kept(logits, sampling).nonzero().squeeze(1).tolist() == sorted(
        ids[: k or size][wanted].tolist()
    )


@given(seed=st.integers(0, 10_000), k=st.integers(1, 40), allowed=st.integers(1, 60))
def test_what_a_mask_forbids_is_not_admitted(seed: int, k: int, allowed: int) -> None:
    weights_V = np.zeros(3001, np.float32)
    weights_V[:allowed] = np.exp(logits_of(seed, allowed).numpy())
    ids = admitted(weights_V, Sampling(top_k=k))
    assert ids is not None and set(ids) <= set(range(allowed)) and len(ids) == min(k, allowed)


@given(k=st.integers(1, 40), levels=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_of_equal_tokens_top_k_admits_as_many_as_it_should(k: int, levels: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    weights_V = draw.integers(1, levels + 1, 3001).astype(np.float32)
    ids = admitted(weights_V, Sampling(top_k=k))
    assert ids is not None and len(set(ids)) == k
    assert weights_V[ids].min() >= np.sort(weights_V)[-k]


def test_penalties_and_biases() -> None:
    logits = np.zeros(5, np.float32)
    sampler = Sampler(
        Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 1.0, 4: 2.0})
    )
    # Ties go to the lower id.
    assert [sampler.next_token(logits) for _ in range(9)] == [4, 4, 3, 4, 4, 4, 3, 4, 0]


@pytest.mark.parametrize("seed", [2**63, 10**30, 1.5, True])
def test_any_other_seed_is_refused(seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed"):
        Sampling(seed=seed)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_any_whole_number_of_64_bits_is_a_seed(seed: int) -> None:
    first, second = (Sampler(Sampling(temperature=1.0, seed=seed)) for _ in range(2))
    logits = np.zeros(50, np.float32)
    assert [first.next_token(logits) for _ in range(5)] == [
        second.next_token(logits) for _ in range(5)
    ]


@given(st.integers(0, 2**32 - 1))
def test_no_probability_at_all_means_the_likeliest_token(seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=50).astype(np.float32)
    sampler = Sampler(Sampling(temperature=2.0, top_p=0.0, seed=seed))
    assert sampler.next_token(logits) == logits.argmax()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.0),
        ("max_new_tokens", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 5e-324),  # a quotient would be infinite
    ],
)
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field}="):
        Sampling(**{field: value})
