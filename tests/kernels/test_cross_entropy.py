"""The memory-efficient losses agree with the standard one in value and gradient, and never hold all
logits.
"""

import pytest
import torch
from torch import Tensor

from deepseek.kernels import cross_entropy
from deepseek.kernels.cross_entropy import (
    CandidateHead,
    linear_cross_entropy,
    reference_cross_entropy,
    token_losses,
)

N, D, V = 50, 8, 97


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use several chunks even at this size."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 7 * V)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    labels[::5] = -100
    return hidden, head, labels


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("train_head", [False, True])
def test_loss_and_gradients_are_those_of_the_reference(
    problem: tuple[Tensor, ...], train_head: bool, cap: float | None
) -> None:
    hidden, head, labels = problem
    results = []
    for function in (reference_cross_entropy, linear_cross_entropy):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(train_head)
        loss = function(h, w, labels, cap=cap)
        (3 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    (loss, h_grad, w_grad), (fast_loss, fast_h_grad, fast_w_grad) = results
    torch.testing.assert_close(fast_loss, loss)
    torch.testing.assert_close(fast_h_grad, h_grad)
    assert (fast_w_grad is None) == (not train_head)
    if train_head:
        torch.testing.assert_close(fast_w_grad, w_grad)


def test_gradient_passes_the_numerical_check() -> None:
    hidden = torch.randn(4, D, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    head, labels = torch.randn(V, D), torch.tensor([3, -100, 96, 0])
    probe = hidden.clone().requires_grad_()
    linear_cross_entropy(probe, head, labels).backward()
    step, direction = 1e-2, torch.randn_like(hidden)
    up = linear_cross_entropy(hidden + step * direction, head, labels)
    down = linear_cross_entropy(hidden - step * direction, head, labels)
    assert probe.grad is not None
    slope = float((probe.grad * direction).sum())
    assert float(up - down) / (2 * step) == pytest.approx(slope, rel=1e-2)


def test_nothing_to_predict_is_a_zero_loss_with_zero_gradient(problem: tuple[Tensor, ...]) -> None:
    hidden, head, labels = problem
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, head, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and not hidden.grad.any()


def test_token_losses_average_to_the_reference(problem: tuple[Tensor, ...]) -> None:
    hidden, head, labels = problem
    losses = token_losses(hidden, head, labels)
    assert not losses[labels == -100].any()
    torch.testing.assert_close(
        losses.sum() / (labels != -100).sum(), reference_cross_entropy(hidden, head, labels)
    )


def test_no_step_holds_more_logits_than_a_chunk(
    problem: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, labels = problem
    largest = 0
    original = cross_entropy._chunk_loss

    def watched(*arguments: object) -> tuple[Tensor, Tensor, Tensor | None]:
        nonlocal largest
        losses, logits, slope = original(*arguments)
        largest = max(largest, logits.numel())
        return losses, logits, slope

    monkeypatch.setattr(cross_entropy, "_chunk_loss", watched)
    linear_cross_entropy(hidden.requires_grad_(), head, labels).backward()
    assert 0 < largest <= cross_entropy.CHUNK_LOGITS < N * V


@pytest.mark.parametrize("cap", [None, 2.0])
def test_all_tokens_as_candidates_are_the_exact_loss(
    problem: tuple[Tensor, ...], cap: float | None
) -> None:
    hidden, head, labels = problem
    candidates = CandidateHead(head, torch.arange(V), sampled=10, seed=0, cap=cap)
    exact = reference_cross_entropy(hidden, head, labels, cap=cap)
    torch.testing.assert_close(candidates.loss(hidden, labels, 0), exact)
    losses = token_losses(hidden, head, labels, cap=cap)
    torch.testing.assert_close(losses.sum() / (labels >= 0).sum(), exact)


def test_sampled_partition_function_is_unbiased(problem: tuple[Tensor, ...]) -> None:
    hidden, head, labels = problem
    labels = torch.where(labels >= 0, labels % 20, 5)
    head = 0.3 * head
    candidates = CandidateHead(head, torch.arange(20), sampled=12, seed=0)
    picked = (hidden * head[labels]).sum(-1)
    estimates = []
    for step in range(400):
        one = [
            float(candidates.loss(hidden[i : i + 1], labels[i : i + 1], step) + picked[i])
            for i in range(3)
        ]
        estimates.append(torch.tensor(one).exp())
    found = torch.stack(estimates)
    exact = (hidden[:3] @ head.T).exp().sum(-1)
    error = found.mean(0) - exact
    assert (error.abs() <= 4 * found.std(0) / 400**0.5).all()
    assert (found.std(0) > 0).all()


def test_sample_depends_on_seed_and_step_alone(problem: tuple[Tensor, ...]) -> None:
    hidden, head, labels = problem
    labels = torch.where(labels >= 0, labels % 20, labels)

    def loss(seed: int, step: int) -> float:
        return float(
            CandidateHead(head, torch.arange(20), sampled=12, seed=seed).loss(hidden, labels, step)
        )

    used = CandidateHead(head, torch.arange(20), sampled=12, seed=1)
    used.loss(hidden, labels, 7)
    assert float(used.loss(hidden, labels, 2)) == loss(1, 2)
    assert len({loss(1, 2), loss(1, 3), loss(2, 2)}) == 3


def test_a_label_outside_the_candidates_is_refused(problem: tuple[Tensor, ...]) -> None:
    hidden, head, labels = problem
    with pytest.raises(ValueError, match="not among the candidate"):
        CandidateHead(head, torch.arange(20), sampled=12, seed=0).loss(hidden, labels, 0)
