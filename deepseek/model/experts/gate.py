"""The gates of plugged experts: at which tokens a module fires, and with what weight.

A gate works in three steps: score -> running mean -> arbitration. A module has two affine functions
of a layer's gate input x, each a row of D+1 numbers whose last is the constant term.

The *detection* score is above 0 if the gate recognises the module's domain, and 1 at the domain's
median. The threshold and scale of the closed form (docs/concepts/gates.md) are folded into the row,
which depends on the module and the base only. The *contrast* score is a log-likelihood by which
modules that fire at the same token share it. It is the linear discriminant between the domains of
all candidates, so it depends on the set of candidates, but not on their plug order.

In a document, the relevance evidence of its tokens (`experts/relevance.py`) is added to both
scores. The evidence is a log-likelihood ratio, so the contrast adds it as it is, and the detection
adds it in units of `NATS`. There the detection score is clamped to 1, the median of its domain, so
that an evidence of -`NATS` keeps an expert from firing even if its gate gives an extreme score to a
kind of text that it was not calibrated on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from deepseek.model.context import GateContext
from deepseek.model.experts.scan import scan

SHARPNESS = 16.0
"""Slope of the sigmoid of the detection score: a fifth of the median score gives weight 0.96."""
NATS = 15.0
"""Relevance evidence, in nats, that equals the median detection score of a domain
(docs/log/gates.md).
"""

RIDGE = 0.3
"""Ridge on the diagonal of a covariance, as a multiple of the diagonal's mean."""


@dataclass(frozen=True)
class GateBank:
    """The gates of all candidate modules at one layer, evaluated together.

    Attributes:
        weight: `[2M, D]`, the detection rows first, then the contrast rows.
        bias: `[2M]`.
        decay: `[M]`, factor on past scores per token.
        max_experts: maximum number of modules that fire at one token.
    """

    weight: Tensor
    bias: Tensor
    decay: Tensor
    max_experts: int

    @staticmethod
    def stack(
        gates: Sequence[Tensor],
        moments: Sequence[Tensor],
        half_lives: Sequence[float],
        max_experts: int,
        device: torch.device,
    ) -> "GateBank":
        """Return the gates of several modules as one bank.

        Args:
            gates: detection row `[D+1]` of each module.
            moments: moments of each module's domain (see `contrasts`).
            half_lives: half-life of past scores of each module, in tokens.
            max_experts: maximum number of modules that fire at one token.
            device: device of the bank.
        """
        rows = torch.cat([torch.stack([*gates]).float(), contrasts(torch.stack([*moments]))]).to(
            device
        )
        decay = torch.tensor([0.5 ** (1.0 / half_life) for half_life in half_lives], device=device)
        return GateBank(rows[:, :-1].contiguous(), rows[:, -1].contiguous(), decay, max_experts)

    @torch.no_grad()
    def weights(
        self,
        layer_idx: int,
        x_BTD: Tensor,
        ctx: GateContext,
        words_BTM: Tensor | None,
        admitted_BM: Tensor | None,
    ) -> Tensor:
        """Return the modules' weights `[B, T, M]` in fp32 and update the sums in `ctx.cache`.

        Args:
            layer_idx: index of the layer.
            x_BTD: gate input of the layer.
            ctx: context of the forward pass.
            words_BTM: accumulated relevance evidence, in nats; None: only hidden states count.
            admitted_BM: the admitted modules (B = 1: the same for every row); None: all.
        """
        scores_BTRM = self.scores(x_BTD)
        state = ctx.cache.gate_state.get(layer_idx) if ctx.cache is not None else None
        counted_BT = ctx.position_ids_BT > 0
        if ctx.token_mask_BT is not None:
            counted_BT = counted_BT & ctx.token_mask_BT
        means_BTRM, state = running_mean(
            scores_BTRM, self.decay, state, counted_BT, ctx.document_ids_BT
        )
        if ctx.cache is not None:
            ctx.cache.gate_state[layer_idx] = state
        detect_BTM, contrast_BTM = means_BTRM.unbind(2)
        if words_BTM is not None:
            detect_BTM = detect_BTM.clamp(max=1.0) + words_BTM / NATS
            contrast_BTM = contrast_BTM + words_BTM
        if admitted_BM is not None:
            detect_BTM = detect_BTM.where(admitted_BM[:, None], -1.0)
        weights_BTM = arbitrate(detect_BTM, contrast_BTM, self.max_experts)
        return weights_BTM * counted_BT[..., None]

    def scores(self, x_BTD: Tensor) -> Tensor:
        """Return the gate scores `[B, T, 2, M]` of each token, in fp32 even under autocast."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores = linear(x_BTD.float(), self.weight, self.bias)
        return scores.view(*x_BTD.shape[:2], 2, -1)


def contrasts(moments_MRD: Tensor) -> Tensor:
    """Return the contrast rows `[M, D+1]`: linear discriminants between the modules' domains.

    Let mu_i and C_i be the mean and covariance of module i's training text, and mu and C their
    means over the modules. Then v_i = (C + lambda I)^-1 (mu_i - mu), with the constant term
    -((mu_i + mu) / 2) . v_i (Fisher, 1936; equal priors). With the within-domain covariance C the
    right module wins at 96 % of tokens; with the covariance of public text it wins at 91 %
    (docs/log/gates.md, 2026-11-25).

    Args:
        moments_MRD: for each module the mean, the residual variances, and the factors f of its
            covariance C_i = diag(variances) + f^T f; all zero if they were not measured.
    """
    means_MD = moments_MRD[:, 0].float()
    variances_MD = moments_MRD[:, 1].float().clamp(min=0.0)
    factors_FD = moments_MRD[:, 2:].float().flatten(0, 1)
    diagonal_D = variances_MD.mean(0)
    factors_FD = factors_FD * len(means_MD) ** -0.5
    # The smallest normal number keeps the diagonal positive if all moments are zero.
    diagonal_D = (
        diagonal_D
        + RIDGE * (diagonal_D + factors_FD.square().sum(0)).mean()
        + torch.finfo(torch.float32).tiny
    )
    centre_D = means_MD.mean(0)
    shift_MD = means_MD - centre_D
    if len(factors_FD) < len(diagonal_D):
        # Invert an F x F matrix instead of a D x D one (Woodbury, 1950).
        scaled_FD = factors_FD / diagonal_D
        rows_MD = shift_MD / diagonal_D
        gram_FF = torch.eye(len(factors_FD), device=diagonal_D.device) + scaled_FD @ factors_FD.mT
        rows_MD = rows_MD - torch.linalg.solve(gram_FF, factors_FD @ rows_MD.mT).mT @ scaled_FD
    else:
        rows_MD = torch.linalg.solve(factors_FD.mT @ factors_FD + diagonal_D.diag(), shift_MD.mT).mT
    constants_M1 = -((shift_MD / 2 + centre_D) * rows_MD).sum(1, keepdim=True)
    # A pack may hold any finite numbers, so the products can overflow.
    return torch.cat([rows_MD, constants_M1], dim=1).nan_to_num(0.0, 0.0, 0.0)


def running_mean(
    scores_BTRM: Tensor,
    decay_M: Tensor,
    state_BRM: Tensor | None = None,
    counted_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the causal, exponentially weighted mean of scores, and the running sums.

    mean_t = sum_s decay^(t-s) z_s / sum_s decay^(t-s) over the tokens s <= t of the same document.
    The denominator makes the mean unbiased at the start of a text. A token that is not counted does
    not decay the sums either, and a new document resets them. Callers do not count padding, nor
    the first token of a document: it is an attention sink, whose hidden state is the same for
    every text, so its score carries no information and would dominate the next tokens.

    Args:
        scores_BTRM: `[B, T, R, M]`, R scores of each of M modules.
        decay_M: factor on past scores per token.
        state_BRM: sums `[B, R+1, M]` of the preceding tokens (the last row is the denominator);
            None: no preceding tokens.
        counted_BT: False for tokens to skip; None: count all.
        document_ids_BT: document of each token in packed rows; None: one document per row.

    Returns:
        Means `[B, T, R, M]`, and the sums `[B, R+1, M]` after the last token.
    """
    batch, length, _, modules = scores_BTRM.shape
    terms = torch.cat([scores_BTRM, scores_BTRM.new_ones(batch, length, 1, modules)], dim=2)
    keep = decay_M.expand(batch, length, 1, modules)
    if counted_BT is not None:
        counted = counted_BT[:, :, None, None]
        terms = terms.where(counted, 0.0)
        keep = keep.where(counted, 1.0)
    if document_ids_BT is not None:
        starts = torch.diff(document_ids_BT, dim=1, prepend=document_ids_BT[:, :1]) != 0
        keep = keep.masked_fill(starts[:, :, None, None], 0.0)
    if state_BRM is not None:
        terms = torch.cat([terms[:, :1] + keep[:, :1] * state_BRM[:, None], terms[:, 1:]], dim=1)
    sums = scan(keep, terms)
    # The denominator is at least 1 after the first counted token. Before that, it and the sums
    # are 0, and the clamp avoids 0 / 0.
    return sums[:, :, :-1] / sums[:, :, -1:].clamp(min=1.0), sums[:, -1]


def arbitrate(detect_BTM: Tensor, contrast_BTM: Tensor, max_experts: int) -> Tensor:
    """Return the weights `[B, T, M]` of modules from their smoothed scores.

    Let S be the modules that fire (detect > 0), at most `max_experts` of them, and a =
    sigmoid(SHARPNESS * detect). Then

        weight_i = min(1, sum_S a) * a_i exp(contrast_i) / sum_S a_j exp(contrast_j)

    A module that fires alone has weight a_i. With equal contrasts the weight is
    a_i / max(1, sum_S a). If no module fires, every weight is exactly 0.

    Args:
        detect_BTM: smoothed detection scores.
        contrast_BTM: smoothed contrast scores, in nats.
        max_experts: maximum number of modules that fire at one token; the modules with the largest
            a_i exp(contrast_i) stay.
    """
    fires = detect_BTM > 0
    strength = torch.sigmoid(SHARPNESS * detect_BTM).where(fires, 0.0)
    claims = (logsigmoid(SHARPNESS * detect_BTM) + contrast_BTM).where(fires, -torch.inf)
    if detect_BTM.shape[-1] > max_experts:
        rank = claims.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        strength = strength.where(rank < max_experts, 0.0)
        claims = claims.where(rank < max_experts, -torch.inf)
    share = torch.softmax(claims, dim=-1).where(claims > -torch.inf, 0.0)
    return share * strength.sum(dim=-1, keepdim=True).clamp(max=1.0)
