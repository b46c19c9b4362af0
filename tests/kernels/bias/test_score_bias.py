"""Attention with a score bias: tiles and chunks agree with the formula, and memory grows linearly
with length.
"""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek.kernels.bias.distance import NUM_BUCKETS
from deepseek.kernels.bias.score_bias import (
    ScoreBias,
    Visible,
    biased_attention,
    chunked_attention,
    reference_attention,
)


def problem(
    seed: int,
    batch: int,
    groups: int,
    repeats: int,
    length: int,
    past: int,
    width: int = 8,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return query, key, value, table, key bias and scale, all of which require gradients."""
    generator = torch.Generator().manual_seed(seed)
    heads, total = groups * repeats, past + length

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype or torch.float32)

    slope = 0.1 * torch.rand(batch, heads, total, generator=generator, dtype=torch.double)
    parts = [
        normal(batch, heads, length, width),
        normal(batch, groups, total, width),
        normal(batch, groups, total, width),
        normal(batch, heads, length, NUM_BUCKETS),
        slope.cumsum(-1),
        1 + 0.2 * normal(batch, heads, length),
    ]
    return [part.requires_grad_() for part in parts]


def from_start(batch: int, length: int, past: int = 0) -> Visible:
    return Visible(torch.zeros(batch, length, dtype=torch.long))


def runs(seed: int, batch: int, length: int, past: int) -> Visible:
    """Return first visible keys as with packed documents, windows or padding: nondecreasing along a
    row, never after the query.
    """
    generator = torch.Generator().manual_seed(seed)
    slots = torch.arange(past, past + length).expand(batch, length)
    cuts = torch.rand(batch, length, generator=generator) < 0.02
    return Visible(torch.where(cuts, slots, 0).cummax(-1).values)


def both(function: object, parts: list[Tensor], visible: Visible) -> list[Tensor]:
    """Return the output, and the gradients of a weighted sum of it."""
    query, key, value, table, slope, scale = parts
    out = function(query, key, value, ScoreBias(table, slope, scale), visible)  # type: ignore[operator]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), parts)]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    repeats=st.integers(1, 3),
    length=st.integers(1, 300),
    past=st.integers(0, 300),
    packed=st.booleans(),
)
def test_tiles_and_chunks_are_the_reference(
    seed: int, batch: int, groups: int, repeats: int, length: int, past: int, packed: bool
) -> None:
    parts = problem(seed, batch, groups, repeats, length, past)
    visible = runs(seed, batch, length, past) if packed else from_start(batch, length)
    expected = both(reference_attention, parts, visible)
    for function in (biased_attention, chunked_attention):
        for found, right in zip(both(function, parts, visible), expected, strict=True):
            torch.testing.assert_close(found, right, atol=2e-5, rtol=1e-4)


def test_far_buckets_and_long_sums_agree() -> None:
    parts = problem(0, 1, 1, 1, 40, 4000)
    visible = from_start(1, 40)
    for found, right in zip(
        both(biased_attention, parts, visible),
        both(reference_attention, parts, visible),
        strict=True,
    ):
        torch.testing.assert_close(found, right, atol=2e-5, rtol=1e-4)


def test_gradients_pass_the_numerical_check() -> None:
    parts = problem(3, 1, 1, 2, 6, 3, width=4, dtype=torch.double)
    visible = Visible(torch.tensor([[0, 0, 0, 6, 6, 6]]))

    def attend(query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
        return biased_attention(query, key, value, ScoreBias(*bias), visible)

    assert torch.autograd.gradcheck(attend, parts)


def test_no_bias_is_plain_attention_to_the_bit() -> None:
    query, key, value, *_ = (part.detach() for part in problem(0, 2, 2, 2, 50, 0))
    zero = ScoreBias(
        torch.zeros(2, 4, 50, NUM_BUCKETS),
        torch.zeros(2, 4, 50, dtype=torch.double),
        torch.ones(2, 4, 50),
    )
    visible = from_start(2, 50)
    plain = reference_attention(query, key, value, ScoreBias(), visible)
    assert torch.equal(reference_attention(query, key, value, zero, visible), plain)
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(
        biased_attention(query, key, value, zero, visible), sdpa, atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_padding_between_tokens_is_neither_seen_nor_counted() -> None:
    query, key, value, table, slope, scale = problem(0, 1, 1, 2, 30, 0)
    real = torch.ones(1, 30, dtype=torch.bool)
    real[:, 7:12] = False
    kept = real[0].nonzero()[:, 0]
    padded = biased_attention(
        query, key, value, ScoreBias(table, slope, scale), Visible(from_start(1, 30).first_BT, real)
    )
    bias = ScoreBias(table[:, :, kept], slope[:, :, kept], scale[:, :, kept])
    alone = biased_attention(
        query[:, :, kept], key[:, :, kept], value[:, :, kept], bias, from_start(1, len(kept))
    )
    torch.testing.assert_close(padded[:, :, kept], alone, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_later_keys_change_nothing() -> None:
    parts = problem(0, 1, 2, 1, 200, 0)
    later = [part.clone() for part in parts]
    for part in later:
        part[:, :, 150:] += 1
    before, after = (
        biased_attention(*some[:3], ScoreBias(*some[3:]), from_start(1, 200))[:, :, :150]
        for some in (parts, later)
    )
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)


@torch.no_grad()
def test_bf16_is_close() -> None:
    parts = problem(0, 1, 2, 2, 100, 0)
    expected = reference_attention(*parts[:3], ScoreBias(*parts[3:]), from_start(1, 100))
    half = [part.bfloat16() for part in parts[:3]]
    found = biased_attention(*half, ScoreBias(*parts[3:]), from_start(1, 100))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("function", [biased_attention, chunked_attention, reference_attention])
@pytest.mark.parametrize("mixed", ["bf16", "autocast", "bf16 values"])
@torch.no_grad()
def test_scores_are_exact_in_16_bits_whatever_the_path(function: object, mixed: str) -> None:
    """A bias of far keys is large, and rounding its sum with the scores to bf16 costs 8 times as
    much as rounding the inputs.
    """
    query, key, value, table, _, scale = problem(0, 1, 2, 4, 512, 0, width=64)
    slopes = 0.5 ** torch.arange(1.0, 9)
    term = slopes.double()[None, :, None] * torch.arange(512).double()
    query, key, value = (part.bfloat16() for part in (query, key, value))
    visible = from_start(1, 512)
    for bias in (ScoreBias(key_BHS=term), ScoreBias(table / 4, term, scale)):
        parts = [query.double(), key.double(), value.double()]
        expected = reference_attention(*parts, bias, visible)
        if mixed == "autocast":
            parts = [query.float(), key.float(), value.float()]
        else:
            wide = torch.float32 if mixed == "bf16 values" else torch.bfloat16
            parts = [query.to(wide), key.to(wide), value]
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed != "bf16"):
            found = function(*parts, bias, visible)  # type: ignore[operator]
        assert found.dtype == parts[0].dtype
        assert (found.double() - expected).norm() < 0.005 * expected.norm()


MEASURE = """
import resource, torch
from deepseek.kernels.bias import score_bias
from deepseek.kernels.bias.score_bias import ScoreBias, Visible, {path}

def run(length):
    parts = [torch.randn(1, 1, length, width, requires_grad=True) for width in (16, 16, 16, 32)]
    slope = torch.rand(1, 1, length, dtype=torch.double, requires_grad=True)
    visible = Visible(torch.zeros(1, length, dtype=torch.long))
    {path}(*parts[:3], ScoreBias(parts[3], slope), visible).sum().backward()

score_bias.CHUNK = 32
run(300)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run({length})
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.parametrize("path", ["biased_attention", "chunked_attention"])
def test_memory_grows_with_the_length_only(path: str) -> None:
    length = 4096
    code = MEASURE.format(path=path, length=length)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    one_score_matrix = 4 * length**2
    assert int(found.stdout) < one_score_matrix / 4
