"""What a router decided, and what can be read off it afterwards."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingDecision:
    """Which experts were chosen, without what they weigh: enough to route the same tokens the same
    way again.

    Attributes:
        ids_NC: the experts whose scores a weight is computed from, the chosen ones first `[N, C]`.
        active_N: how many of them are in use; None when all are.
    """

    ids_NC: Tensor
    active_N: Tensor | None


@dataclass(frozen=True)
class Dispatch:
    """Which experts each token goes to, and with what weight.

    Attributes:
        ids_NA: expert ids `[N, A]`, A the same for every token; the first `active_N` of a row are
            in use.
        weights_NA: their weights, fp32 `[N, A]`; exactly 0 in the unused slots.
        active_N: number of slots in use per token; None when all A are.
        logits_NE: router logits that the weights were computed from, fp32 `[N, E]`.
        candidates_NC: experts that the weights were normalised over, the first A being `ids_NA`;
            None when just those.
    """

    ids_NA: Tensor
    weights_NA: Tensor
    active_N: Tensor | None
    logits_NE: Tensor
    candidates_NC: Tensor | None = None

    @property
    def choice(self) -> RoutingDecision:
        """What to hand to the router to have it choose the same experts again."""
        return RoutingDecision(
            self.ids_NA if self.candidates_NC is None else self.candidates_NC, self.active_N
        )

    @property
    def ids(self) -> Tensor:
        """Expert ids `[N, A]`."""
        return self.ids_NA

    @property
    def weights(self) -> Tensor:
        """Expert weights `[N, A]`."""
        return self.weights_NA

    @property
    def kept_NA(self) -> Tensor:
        """True in the slots in use `[N, A]`."""
        if self.active_N is None:
            return torch.ones_like(self.ids_NA, dtype=torch.bool)
        return (
            torch.arange(self.ids_NA.shape[1], device=self.ids_NA.device) < self.active_N[:, None]
        )

    @property
    def slots_NA(self) -> Tensor:
        """Expert ids `[N, A]` with E, which is no expert, in the unused slots: what the kernels
        take.
        """
        return (
            self.ids_NA
            if self.active_N is None
            else self.ids_NA.masked_fill(~self.kept_NA, self.logits_NE.shape[1])
        )

    def load_E(self, token_mask_N: Tensor | None = None) -> Tensor:
        """Return the number of (real) tokens per expert, int64 `[E]`."""
        kept_NA = self.kept_NA if token_mask_N is None else self.kept_NA & token_mask_N[:, None]
        load_E = torch.zeros(self.logits_NE.shape[1], dtype=torch.int64, device=self.ids_NA.device)
        return load_E.scatter_add_(0, self.ids_NA.flatten(), kept_NA.flatten().long())


@dataclass(frozen=True)
class RouterStats:
    """Statistics of one layer's routing in one forward pass; every property is a tensor on the
    model's device.

    Only references are kept in the forward pass. The figures are computed when they are read, so
    decoding pays nothing.
    """

    layer_idx: int
    dispatch: Dispatch
    token_mask_N: Tensor | None = None

    @property
    def load(self) -> Tensor:
        """Share of all expert calls per expert `[E]`; sums to 1."""
        load_E = self.dispatch.load_E(self.token_mask_N).float()
        return load_E / load_E.sum().clamp(min=1)

    @property
    def mean_active(self) -> Tensor:
        """Mean number of experts a token, a scalar."""
        return self._mean(self.dispatch.kept_NA.sum(-1).float())

    @property
    def dropped_mass(self) -> Tensor:
        """Mean weight that the tokens' unused experts would have had, a scalar; 0 when weights are
        renormalised.
        """
        return self._mean((1 - self.dispatch.weights_NA.detach().sum(-1)).clamp(min=0))

    @property
    def entropy(self) -> Tensor:
        """Mean entropy in nats of the softmax over all experts, a scalar."""
        log_p_NE = self.dispatch.logits_NE.detach().log_softmax(-1)
        return self._mean(-(log_p_NE.exp() * log_p_NE).sum(-1))

    def _mean(self, value_N: Tensor) -> Tensor:
        mask_N = (
            torch.ones_like(value_N) if self.token_mask_N is None else self.token_mask_N.float()
        )
        return (value_N * mask_N).sum() / mask_N.sum().clamp(min=1)
