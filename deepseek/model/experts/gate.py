"""When a plugged expert speaks, and how loud: score -> running mean -> arbitration.

A module scores a layer's gate input x by two affine functions, rows of D+1 numbers whose last is
the constant term. The first *detects*: it is positive where the module's domain is recognised and 1
at its median, with threshold and scale of the closed form (docs/concepts/gates.md) folded in, and
depends on the module and the base alone. The second *contrasts*: a log-likelihood by which modules
that fire on the same token share it. It is the linear discriminant between the domains of all
candidates, so it depends on the set of them, and not on the order in which they were plugged.

In a document the evidence of its words (`experts/relevance.py`) is added to both. It is a
log-likelihood ratio, so the contrast takes it as it is, and the detection in units of `NATS`. There
no gate counts for more than the median of its domain, so that `NATS` against an expert silence it
whatever its gate makes of a kind of text that it never met.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from deepseek.model.context import ForwardContext
from deepseek.model.experts.scan import scan

SHARPNESS = 16.0  # steepness of the detection score's sigmoid: at a fifth of the median score a token is let in at 0.96
NATS = 15.0
"""Evidence of words that weighs as much as the median detection score of a domain, in nats
(docs/log/gates.md).
"""

RIDGE = 0.3
"""What is added to the diagonal of a covariance, in units of its mean."""


@dataclass(frozen=True)
class GateBank:
    """The gates of all candidate modules that own one layer, evaluated together.

    weight: `[2M, D]`, detecting rows first. bias: `[2M]`. decay: `[M]`, what a past score keeps per
    token.
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
        """Return the bank of modules with `gates` (each `[D+1]`), `moments` (see `contrasts`),
        half-lives in tokens.
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
        ctx: ForwardContext,
        words_BTM: Tensor | None,
        admitted_BM: Tensor | None,
    ) -> Tensor:
        """Return the modules' weights `[B, T, M]` in fp32, and carry the running sums on in
        `ctx.cache`.

        Args:
            layer_idx: of the layer whose modules these are.
            x_BTD: its gate input.
            ctx: of the forward pass.
            words_BTM: evidence of the words so far, in nats; None: hidden states decide alone.
            admitted_BM: which modules take part at all, B = 1: every row has the same ones; None:
                all.
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
        """Return each token's own scores `[B, T, 2, M]`, in fp32 whatever autocast says."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores = linear(x_BTD.float(), self.weight, self.bias)
        return scores.view(*x_BTD.shape[:2], 2, -1)


def contrasts(moments_MRD: Tensor) -> Tensor:
    """Return the contrasting rows `[M, D+1]` of modules: linear discriminants with the covariance
    within domains.

    With mu_i and C_i mean and covariance of module i's own text, mu and C their means over the
    modules, v_i = (C + lambda I)^-1 (mu_i - mu) and the constant is -((mu_i + mu) / 2) . v_i
    (Fisher, 1936; equal priors). The covariance of public text in place of C finds the right one at
    91 % of tokens, this at 96 % (docs/log/gates.md, 2026-11-25).

    Args:
        moments_MRD: for each module its mean, the variances that its factors leave, and factors f
            with C_i = diag(variances) + f^T f; all zero where nothing is known of it.
    """
    means_MD = moments_MRD[:, 0].float()
    variances_MD = moments_MRD[:, 1].float().clamp(min=0.0)
    factors_FD = moments_MRD[:, 2:].float().flatten(0, 1)
    own_D = variances_MD.mean(0)
    factors_FD = factors_FD * len(means_MD) ** -0.5
    own_D = (
        own_D
        + RIDGE * (own_D + factors_FD.square().sum(0)).mean()
        + torch.finfo(torch.float32).tiny
    )
    centre_D = means_MD.mean(0)
    shift_MD = means_MD - centre_D
    if len(factors_FD) < len(
        own_D
    ):  # few factors: the inverse goes by way of them (Woodbury, 1950)
        scaled_FD = factors_FD / own_D
        rows_MD = shift_MD / own_D
        gram_FF = torch.eye(len(factors_FD), device=own_D.device) + scaled_FD @ factors_FD.mT
        rows_MD = rows_MD - torch.linalg.solve(gram_FF, factors_FD @ rows_MD.mT).mT @ scaled_FD
    else:
        rows_MD = torch.linalg.solve(factors_FD.mT @ factors_FD + own_D.diag(), shift_MD.mT).mT
    constants_M1 = -((shift_MD / 2 + centre_D) * rows_MD).sum(1, keepdim=True)
    return torch.cat([rows_MD, constants_M1], dim=1).nan_to_num(
        0.0, 0.0, 0.0
    )  # a pack may hold any finite number


def running_mean(
    scores_BTRM: Tensor,
    decay_M: Tensor,
    state_BRM: Tensor | None = None,
    counted_BT: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the causal, exponentially forgetting mean of scores, and the state to go on from.

    mean_t = sum_s decay^(t-s) z_s / sum_s decay^(t-s) over the tokens s <= t of the same document,
    so that the first tokens of a text count as much as they are. What is not counted does not age
    the sums either; a new document clears them. Padding is not counted, and neither is the first
    token of a document: whatever the text, attention sinks there and its stream is the same, so
    that it tells nothing and would drown the tokens after it.

    Args:
        scores_BTRM: `[B, T, R, M]`, R scores of each of M modules.
        counted_BT: False where a token does not count; None: every one does.
        state_BRM: sums `[B, R+1, M]` after the tokens before these (the last row is the
            denominator).

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
    # The denominator is at least 1 once a token counted; before that it is 0 and so is the sum.
    return sums[:, :, :-1] / sums[:, :, -1:].clamp(min=1.0), sums[:, -1]


def arbitrate(detect_BTM: Tensor, contrast_BTM: Tensor, max_experts: int) -> Tensor:
    """Return the weights `[B, T, M]` of modules from their smoothed scores.

    With S the modules that fire (detect > 0), at most `max_experts`, and strength a =
    sigmoid(SHARPNESS * detect): weight_i = min(1, sum_S a) * a_i exp(contrast_i) / sum_S a_j
    exp(contrast_j). A module that fires alone has weight a_i; without contrast this is a_i / max(1,
    sum_S a). Where none fires every weight is exactly 0.
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
