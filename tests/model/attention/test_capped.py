"""Attention with capped scores: values, gradients, and the model that has it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.model.attention import capped
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def reference(query, key, value, cap, mask):
    """Return the definition, with all scores in memory and keys repeated for their heads."""
    heads = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(heads, dim=1) for part in (key, value))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    heads=st.integers(1, 3),
    length=st.integers(1, 9),
    past=st.integers(0, 5),
    cap=st.floats(0.2, 50),
    masked=st.booleans(),
    most=st.sampled_from([1, 40, 1 << 24]),
)
def test_values_and_gradients_are_those_of_the_definition(
    batch, groups, heads, length, past, cap, masked, most
):
    torch.manual_seed(length)
    total = past + length
    shapes = [(groups * heads, length), (groups, total), (groups, total)]
    inputs = [
        torch.randn(batch, count, size, 6, dtype=torch.float64, requires_grad=True)
        for count, size in shapes
    ]
    causal = torch.ones(length, total, dtype=torch.bool).tril(past)
    mask = causal.expand(batch, 1, -1, -1)
    if masked:
        mask = mask & (torch.rand(batch, 1, length, total) < 0.7)
        mask[..., 0] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capped, "MAX_SCORES", most)
        got = capped.capped_attention(*inputs, cap, mask if masked else None)
        expected = reference(*inputs, cap, mask)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        weights = torch.randn_like(got)
        pairs = zip(
            torch.autograd.grad((got * weights).sum(), inputs),
            torch.autograd.grad((expected * weights).sum(), inputs),
            strict=True,
        )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixed", [False, True])
def test_bfloat16_is_nearly_as_exact_as_bfloat16_can_be(mixed):
    torch.manual_seed(0)
    shapes = [(8, 4), (4, 4), (4, 1)]  # heads and standard deviation of queries, keys and values
    inputs = [(torch.randn(1, heads, 64, 64) * std).bfloat16() for heads, std in shapes]
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    exact = reference(*(part.double() for part in inputs), 50.0, causal)
    rounding = (exact.bfloat16().double() - exact).norm()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        got = capped.capped_attention(*inputs, 50.0, None)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() < 2 * rounding


def test_scores_are_as_exact_under_autocast_forward_and_backward():
    torch.manual_seed(0)
    inputs = [4 * torch.randn(1, heads, 64, 64) for heads in (8, 4, 4)]
    results = []
    for mixed in (False, True):
        for part in inputs:
            part.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            attended = capped.capped_attention(*inputs, 50.0, None)
        results.append([attended, *torch.autograd.grad(attended.square().sum(), inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("field", ["attn_logit_softcapping", "final_logit_softcapping"])
@torch.no_grad()
def test_each_cap_changes_the_logits(field):
    torch.manual_seed(0)
    plain = DeepSeekModel(ModelConfig(**SHAPE)).eval()
    one = DeepSeekModel(ModelConfig(**SHAPE, **{field: 0.1})).eval()
    one.load_state_dict(plain.state_dict())
    ids = torch.arange(9)[None]
    assert not torch.allclose(one(ids).logits, plain(ids).logits, atol=1e-3)
    whole, cache = one(ids).logits, one(ids[:, :5], use_cache=True).cache
    torch.testing.assert_close(one(ids[:, 5:], cache=cache).logits, whole[:, 5:])


@pytest.mark.parametrize(
    "changes",
    [{"attention": "lsh"}, {"positional_encoding": "alibi"}],
    ids=lambda one: next(iter(one)),
)
def test_scores_are_capped_in_plain_full_attention_only(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ConfigError, match=f"contradicts {name}='{value}'"):
        ModelConfig(**SHAPE, **changes, attn_logit_softcapping=50.0)
