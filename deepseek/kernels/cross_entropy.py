"""Cross-entropy of a linear head without materialising the `[N, V]` logits.

`linear_cross_entropy` is exact. It processes chunks of tokens and computes the gradient of a
chunk's logits together with its loss. A step costs two matrix products per chunk (three if the head
is trained), and nothing is recomputed. Fusing head and loss follows Liger-Kernel (arXiv:2410.10989)
and Cut Cross-Entropy (arXiv:2411.09009); this version is plain PyTorch, because the matrix products
dominate.

`CandidateHead` is a cheaper loss for training: exact over the tokens that can be labels, sampled
over the rest of the vocabulary (importance sampling of the partition function, Bengio & Senecal
2008).
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.device.transfer import to_device

IGNORED_LABEL = -100

CHUNK_LOGITS = 1 << 23
"""Maximum number of logits in memory: 32 MB in fp32, about the size of a last-level cache, and
large enough for full matmul speed.
"""


def reference_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, cap: float | None = None
) -> Tensor:
    """Return the mean loss over labels that are not ignored: the definition that the fast versions
    are tested against.
    """
    logits_NV = (hidden_ND @ head_VD.T).float()
    if cap is not None:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED_LABEL)


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    log_weight_V: Tensor | None = None,
    cap: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the mean cross-entropy of `hidden_ND @ head_VD.T + log_weight_V` against the labels.

    Args:
        hidden_ND: hidden states `[N, D]`.
        head_VD: weights of the head `[V, D]`.
        labels_N: token ids `[N]`; -100 is ignored.
        log_weight_V: added to the logits; None (default) adds nothing.
        cap: logits z are capped to cap * tanh(z / cap) before `log_weight_V` is added; None
            (default): no cap.
        dtype: dtype of the matrix products; None (default): the head's.

    Returns:
        The mean loss in nats, an fp32 scalar; 0 if all labels are ignored. Gradients flow to
        `hidden_ND`, and to `head_VD` if it requires them.
    """
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden_ND, head_VD, labels_N, log_weight_V, cap, dtype or head_VD.dtype
    )
    return loss


@torch.no_grad()
def token_losses(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, cap: float | None = None
) -> Tensor:
    """Return the exact loss of every token, for evaluation.

    Args:
        hidden_ND, head_VD, labels_N, cap: see `linear_cross_entropy`.

    Returns:
        Losses in nats, fp32 `[N]`; 0 where the label is ignored.
    """
    labels_N = to_device(labels_N, hidden_ND.device)
    losses_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
    for part in _chunks(len(labels_N), len(head_VD)):
        losses_N[part], _, _ = _chunk_loss(hidden_ND[part], head_VD, labels_N[part], None, cap)
    return losses_N


class CandidateHead:
    """A frozen head restricted to candidate tokens, with a sampled estimate for the rest of the
    vocabulary.

    With C the candidates and S a uniform sample of m of the R other tokens, `sum_C e^z + (R/m)
    sum_S e^z` is an unbiased estimate of the partition function. Every label must be a candidate.
    The head's rows are copied, so later changes to it have no effect.

    Args:
        head_VD: weights of the head `[V, D]`.
        candidates_C: token ids of the candidates.
        sampled: number m of other tokens, drawn anew at every step.
        seed: seed of the samples.
        cap: cap of the logits (see `linear_cross_entropy`); None (default): no cap.
        dtype: dtype of the matrix products; None (default): the head's.
    """

    def __init__(
        self,
        head_VD: Tensor,
        candidates_C: Tensor,
        sampled: int,
        seed: int,
        cap: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Copy the candidate rows of the head."""
        vocab_size, hidden_size = head_VD.shape
        device = head_VD.device
        keep_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        keep_V[candidates_C.to(device)] = True
        self.candidates_C = keep_V.nonzero().flatten()
        self.rest_R = (~keep_V).nonzero().flatten()
        self.sampled = min(sampled, len(self.rest_R))
        self.seed = seed
        self.cap = cap
        self._head_VD = head_VD.detach()
        size = len(self.candidates_C) + self.sampled
        self._rows = torch.empty(size, hidden_size, dtype=dtype or head_VD.dtype, device=device)
        self._rows[: len(self.candidates_C)] = self._head_VD[self.candidates_C]
        self._log_weight = torch.zeros(size, device=device)
        if self.sampled:
            self._log_weight[len(self.candidates_C) :] = math.log(len(self.rest_R) / self.sampled)
        self._position_V = torch.full((vocab_size,), -1, device=device)
        self._position_V[self.candidates_C] = torch.arange(len(self.candidates_C), device=device)

    def loss(self, hidden_ND: Tensor, labels_N: Tensor, step: int) -> Tensor:
        """Return the estimated mean loss in nats.

        Args:
            hidden_ND: hidden states `[N, D]`.
            labels_N: token ids `[N]`; -100 is ignored.
            step: the sample depends on the seed and on `step` alone.

        Raises:
            ValueError: a label is not a candidate.
        """
        # NumPy accepts the pair as its seed. A torch.Generator takes one number, and seed 1 at step
        # 3 must differ from seed 3 at step 1.
        drawn = np.random.default_rng((self.seed, step)).choice(
            len(self.rest_R), self.sampled, replace=False
        )
        sample = self.rest_R[to_device(torch.from_numpy(drawn), self.rest_R.device)]
        self._rows[len(self.candidates_C) :] = self._head_VD[sample]
        labels_N = to_device(labels_N, self._position_V.device)
        real_N = labels_N != IGNORED_LABEL
        positions_N = torch.where(real_N, self._position_V[labels_N.clamp(min=0)], IGNORED_LABEL)
        if (positions_N[real_N] < 0).any():
            raise ValueError("a label is not among the candidate tokens of the head.")
        return linear_cross_entropy(hidden_ND, self._rows, positions_N, self._log_weight, self.cap)


def _chunks(num_tokens: int, vocab_size: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // vocab_size)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _chunk_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    log_weight_V: Tensor | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the losses `[N]`, the log probabilities `[N, V]`, and the slope `[N, V]` of the cap,
    None without a cap, of one chunk in fp32.
    """
    logits_NV = F.linear(hidden_ND.to(head_VD.dtype), head_VD).float()
    slope_NV = None
    if cap is not None:
        tanh_NV = torch.tanh(logits_NV / cap)
        slope_NV = 1.0 - tanh_NV.square()
        logits_NV = cap * tanh_NV
    if log_weight_V is not None:
        logits_NV += log_weight_V
    logits_NV -= logits_NV.logsumexp(-1, keepdim=True)
    picked_N = logits_NV.gather(1, labels_N.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels_N == IGNORED_LABEL, 0.0, -picked_N), logits_NV, slope_NV


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients in the forward pass; the backward pass only scales the
    gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        log_weight_V: Tensor | None,
        cap: float | None,
        dtype: torch.dtype,
    ) -> Tensor:
        head = head_VD.detach().to(dtype)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needs_head else None
        count = (labels_N != IGNORED_LABEL).sum().clamp(min=1)
        total = torch.zeros((), device=hidden_ND.device)
        for part in _chunks(len(labels_N), len(head)):
            losses_N, logits_NV, slope_NV = _chunk_loss(
                hidden_ND[part], head, labels_N[part], log_weight_V, cap
            )
            total += losses_N.sum()
            if grad_hidden_ND is None and grad_head_VD is None:
                continue
            grad_NV = _logit_gradient(logits_NV, labels_N[part], count)
            if slope_NV is not None:
                grad_NV *= slope_NV
            grad_NV = grad_NV.to(head.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = grad_NV @ head
            if grad_head_VD is not None:
                grad_head_VD += grad_NV.T @ hidden_ND[part].to(head.dtype)
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        ctx.head_dtype = head_VD.dtype
        return total / count

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            None if grad_hidden_ND is None else grad_hidden_ND * scale,
            None if grad_head_VD is None else (grad_head_VD * scale).to(ctx.head_dtype),
            None,
            None,
            None,
            None,
        )


def _logit_gradient(log_probs_NV: Tensor, labels_N: Tensor, count: Tensor) -> Tensor:
    """Overwrite log probabilities with d(mean loss)/d(logits) = (softmax - one_hot) / count; 0
    where the label is ignored.
    """
    real_N = labels_N != IGNORED_LABEL
    grad_NV = log_probs_NV.exp_()
    grad_NV[torch.arange(len(labels_N), device=labels_N.device), labels_N.clamp(min=0)] -= 1.0
    grad_NV *= (real_N / count)[:, None]
    return grad_NV
