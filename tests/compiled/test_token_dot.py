"""Products with single tokens agree with NumPy's and do not depend on other tokens."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from deepseek.compiled.token_dot import TOKENS, mix_tokens, score_buckets, score_tokens
from deepseek.kernels.int8_layout import GROUP


@njit
def run_scores(query, tokens, scores):
    width = len(query)
    score_tokens(query.ctypes.data, tokens.ctypes.data, len(tokens), width, scores.ctypes.data)


@njit
def run_mix(weights, tokens, offset, out):
    count = len(tokens)
    mix_tokens(weights.ctypes.data, tokens.ctypes.data, count, offset, len(out), out.ctypes.data)


@njit
def run_buckets(x, matrix, scores):
    score_buckets(x.ctypes.data, matrix.ctypes.data, len(x), len(scores), scores.ctypes.data)


def normal_bf16(*shape, seed):
    """Random numbers, as bits of bf16 and as fp64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator).bfloat16()
    return values.view(torch.uint16).numpy(), values.double().numpy()


def addresses(memory, order):
    return np.array([memory[n].ctypes.data for n in order])


orders = st.lists(st.integers(0, 39), min_size=1, max_size=70)
widths = st.sampled_from([64, 128, 256])


@settings(max_examples=30, deadline=None)
@given(orders, widths)
def test_scores_are_those_of_numpy_whatever_tokens_are_beside(order, width):
    keys, exact_keys = normal_bf16(40, width, seed=1)
    query, exact_query = normal_bf16(width, seed=2)
    order += order[:1] * (-len(order) % TOKENS)
    scores = np.empty(len(order), np.float32)
    run_scores(query, addresses(keys, order), scores)
    exact = exact_keys @ exact_query
    size = np.abs(exact_keys) @ np.abs(exact_query)
    assert (np.abs(scores - exact[order]) < 1e-5 * size[order]).all()
    alone = np.empty(TOKENS, np.float32)
    for score, n in zip(scores, order, strict=True):
        run_scores(query, addresses(keys, [n] * TOKENS), alone)
        assert (alone == score).all()


@settings(max_examples=30, deadline=None)
@given(orders, widths)
def test_mixtures_are_those_of_numpy(order, width):
    memory, exact = normal_bf16(40, 2 * width, seed=3)
    weights = np.random.default_rng(4).random(len(order), np.float32)
    out = np.empty(width, np.float32)
    run_mix(weights, addresses(memory, order), 2 * width, out)
    values = exact[order, width:]
    assert np.allclose(out, weights @ values, rtol=0, atol=1e-5 * (weights @ np.abs(values)).max())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 130), st.sampled_from([GROUP, 3 * GROUP]))
def test_scores_of_buckets_are_those_of_numpy(width, buckets):
    generator = np.random.default_rng(width)
    x, matrix = generator.normal(size=width), generator.normal(size=(width + 1, buckets))
    scores = np.empty(buckets, np.float32)
    run_buckets(x.astype(np.float32), matrix.astype(np.float32), scores)
    assert np.allclose(scores, x @ matrix[:-1] + matrix[-1], rtol=0, atol=1e-5 * width**0.5 * 3)
