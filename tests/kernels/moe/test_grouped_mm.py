"""Every implementation of the experts agrees with a loop over experts, forward and backward."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek.kernels.moe.grouped_mm import mix_experts, mix_experts_grouped, mix_experts_reference

D, F = 24, 16
# (tokens, experts, slots per token): no token, one token, few tokens per expert, many tokens per
# expert, all experts at every token.
SIZES = [(0, 4, 2), (1, 8, 2), (9, 32, 4), (200, 4, 2), (33, 3, 3)]


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def kernels(request, monkeypatch):
    """Run every test with compiled kernels, however small the problem, and with torch's
    operators.
    """
    monkeypatch.setattr(
        "deepseek.kernels.moe.grouped_mm.SMALL", 0 if request.param == "compiled" else 1 << 60
    )


def problem(
    tokens: int,
    experts: int,
    slots: int,
    dtype: torch.dtype = torch.float32,
    widths: tuple[int, int] = (D, F),
) -> tuple[Tensor, ...]:
    """Return inputs of `mix_experts` with some unused slots and no token for the last expert."""
    D, F = widths
    torch.manual_seed(tokens + experts)
    x = torch.randn(tokens, D, dtype=dtype, requires_grad=True)
    gate_up = (torch.randn(experts, 2 * F, D) * 0.2).to(dtype).requires_grad_()
    down = (torch.randn(experts, D, F) * 0.2).to(dtype).requires_grad_()
    ids = torch.rand(tokens, experts).argsort(-1)[:, :slots]
    idle = (torch.rand(tokens, slots) < 0.3) | (ids == experts - 1)
    weights = torch.rand(tokens, slots).masked_fill(idle, 0).requires_grad_()
    return x, gate_up, down, ids.masked_fill(idle, experts), weights


def outcome(way, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Output, and the gradients of x, both projections and the weights for a fixed random loss."""
    y = way(*inputs)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    return [y.detach(), *torch.autograd.grad(loss, (inputs[0], inputs[1], inputs[2], inputs[4]))]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("way", [mix_experts, mix_experts_grouped], ids=["segments", "grouped_mm"])
def test_fast_ways_agree_with_the_reference(way, size):
    inputs = problem(*size)
    for fast, slow in zip(
        outcome(way, inputs), outcome(mix_experts_reference, inputs), strict=True
    ):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_inference_agrees_with_the_reference(size):
    inputs = problem(*size)
    with torch.no_grad():
        torch.testing.assert_close(
            mix_experts(*inputs), mix_experts_reference(*inputs), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bfloat16_is_as_exact_as_bfloat16_can_be(size):
    inputs = problem(*size, dtype=torch.bfloat16)
    exact = mix_experts_reference(*[t.double() if t.is_floating_point() else t for t in inputs])
    for result in (mix_experts(*inputs), mix_experts(*[t.detach() for t in inputs])):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bfloat16_gradients_are_those_of_the_reference(size):
    inputs = problem(*size, dtype=torch.bfloat16)
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    exact = outcome(mix_experts_reference, wide)
    rounded = outcome(mix_experts_reference, inputs)
    for fast, reference, slow in zip(outcome(mix_experts, inputs), rounded, exact, strict=True):
        # The error of a bf16 sum depends on the processor; the fast implementation's may not exceed
        # that of torch's operators.
        error, allowed = (fast.double() - slow).abs(), (reference.double() - slow).abs()
        assert error.norm() <= 1.2 * allowed.norm() + 1e-3 * slow.norm()
        assert not error.numel() or error.max() <= 2 * allowed.max() + 1e-2 * slow.abs().max()


@pytest.mark.parametrize("way", [mix_experts, mix_experts_grouped], ids=["segments", "grouped_mm"])
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from(SIZES),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(size=(9, 32, 4), widths=(64, 20), dtype=torch.bfloat16)
def test_experts_of_any_width_train(way, size, widths, dtype):
    inputs = problem(*size, dtype=dtype, widths=widths)
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    exact = outcome(mix_experts_reference, wide)
    small = 1e-5 if dtype == torch.float32 else 0.03
    for fast, slow in zip(outcome(way, inputs), exact, strict=True):
        assert fast.shape == slow.shape
        assert (fast.double() - slow).norm() <= small * (1 + slow.norm())


def test_machines_without_numba_or_mkl_compute_the_same(monkeypatch):
    inputs = problem(9, 32, 4)
    expected = outcome(mix_experts, inputs)
    monkeypatch.setattr("deepseek.kernels.numba.openmp.runtime", lambda: None)
    for a, b in zip(outcome(mix_experts, inputs), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_computes_the_same(threads):
    before = torch.get_num_threads()
    inputs = problem(300, 4, 2)
    expected = outcome(mix_experts_reference, inputs)
    torch.set_num_threads(threads)
    try:
        for a, b in zip(outcome(mix_experts, inputs), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_gradients_match_finite_differences():
    x, gate_up, down, ids, weights = (t.detach() for t in problem(3, 3, 2))
    narrow = (x[:, :4], gate_up[:, : 2 * 3, :4], down[:, :4, :3], ids, weights)
    inputs = [t.double().requires_grad_() if t.is_floating_point() else t for t in narrow]
    assert torch.autograd.gradcheck(mix_experts, inputs)


def test_idle_slots_are_never_read():
    x, gate_up, down, ids, weights = (t.detach() for t in problem(6, 4, 2))
    gate_up[3], down[3] = float("nan"), float("nan")  # the last expert gets no token
    for way in (mix_experts, mix_experts_grouped, mix_experts_reference):
        assert torch.isfinite(way(x, gate_up, down, ids, weights)).all()


@pytest.mark.parametrize("way", [mix_experts, mix_experts_grouped], ids=["segments", "grouped_mm"])
def test_no_slot_in_use_gives_zeros_and_zero_gradients(way):
    x, gate_up, down, ids, weights = problem(6, 4, 2)
    for result in outcome(way, (x, gate_up, down, torch.full_like(ids, 4), weights)):
        assert not result.any()


def test_frozen_experts_get_no_gradient_but_the_tokens_do():
    x, gate_up, down, ids, weights = problem(6, 4, 2)
    mix_experts(x, gate_up.detach(), down.detach(), ids, weights).sum().backward()
    expected = torch.autograd.grad(mix_experts_reference(x, gate_up, down, ids, weights).sum(), x)[
        0
    ]
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=0)


def test_compiled_agrees_forward_and_backward():
    inputs = problem(20, 6, 3)
    compiled = torch.compile(mix_experts, fullgraph=True, backend="aot_eager")
    for fast, slow in zip(
        outcome(compiled, inputs), outcome(mix_experts_reference, inputs), strict=True
    ):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
