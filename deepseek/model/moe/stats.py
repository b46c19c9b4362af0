"""The result of routing: decisions, dispatch and statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingDecision:
    """The chosen experts without their weights, for routing replay on the same tokens.

    Attributes:
        ids_NC: the experts that the weights are normalised over, active ones first, `[N, C]`.
        active_N: number of active experts per token; None: all, as in top-k routing.
    """

    ids_NC: Tensor
    active_N: Tensor | None


@dataclass(frozen=True)
class Dispatch:
    """The experts of each token and their weights.

    Attributes:
        ids_NA: expert ids `[N, A]`, with the same A for every token. The first `active_N` slots of
            a row are in use.
        weights_NA: expert weights, fp32 `[N, A]`; exactly 0 in unused slots.
        active_N: number of slots in use per token; None: all A.
        logits_NE: router logits, fp32 `[N, E]`.
        candidates_NC: experts that the weights were normalised over, starting with `ids_NA`; None:
            just `ids_NA`.
    """

    ids_NA: Tensor
    weights_NA: Tensor
    active_N: Tensor | None
    logits_NE: Tensor
    candidates_NC: Tensor | None = None

    @property
    def choice(self) -> RoutingDecision:
        """The decision to pass to `Router.route` to replay this routing."""
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
        """Mask `[N, A]` of the slots in use."""
        if self.active_N is None:
            return torch.ones_like(self.ids_NA, dtype=torch.bool)
        return (
            torch.arange(self.ids_NA.shape[1], device=self.ids_NA.device) < self.active_N[:, None]
        )

    @property
    def slots_NA(self) -> Tensor:
        """Expert ids `[N, A]` as the kernels expect them, with the invalid id E in unused slots."""
        return (
            self.ids_NA
            if self.active_N is None
            else self.ids_NA.masked_fill(~self.kept_NA, self.logits_NE.shape[1])
        )

    def load_E(self, token_mask_N: Tensor | None = None) -> Tensor:
        """Return the number of tokens per expert, without padding, int64 `[E]`."""
        kept_NA = self.kept_NA if token_mask_N is None else self.kept_NA & token_mask_N[:, None]
        load_E = torch.zeros(self.logits_NE.shape[1], dtype=torch.int64, device=self.ids_NA.device)
        return load_E.scatter_add_(0, self.ids_NA.flatten(), kept_NA.flatten().long())


@dataclass(frozen=True)
class RouterStats:
    """Routing statistics of one layer in one forward pass.

    Every property is a tensor on the model's device. The forward pass only stores references, and
    statistics are computed when they are read, so decoding does not pay for them.
    """

    layer_idx: int
    dispatch: Dispatch
    token_mask_N: Tensor | None = None

    @property
    def load(self) -> Tensor:
        """Share of each expert in all expert calls `[E]`; sums to 1."""
        load_E = self.dispatch.load_E(self.token_mask_N).float()
        return load_E / load_E.sum().clamp(min=1)

    @property
    def mean_active(self) -> Tensor:
        """Mean number of experts per token, a scalar."""
        return self._mean(self.dispatch.kept_NA.sum(-1).float())

    @property
    def dropped_mass(self) -> Tensor:
        """Mean weight of experts that were not chosen, a scalar; 0 if weights are renormalised."""
        return self._mean((1 - self.dispatch.weights_NA.detach().sum(-1)).clamp(min=0))

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of the softmax over all experts in nats, a scalar."""
        log_p_NE = self.dispatch.logits_NE.detach().log_softmax(-1)
        return self._mean(-(log_p_NE.exp() * log_p_NE).sum(-1))

    def _mean(self, value_N: Tensor) -> Tensor:
        mask_N = (
            torch.ones_like(value_N) if self.token_mask_N is None else self.token_mask_N.float()
        )
        return (value_N * mask_N).sum() / mask_N.sum().clamp(min=1)
