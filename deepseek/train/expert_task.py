"""Training one expert module on a frozen base, as the loop sees it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.data.loader import Batch
from deepseek.kernels.cross_entropy import IGNORED_LABEL, CandidateHead, token_losses
from deepseek.model.experts import ExpertModule
from deepseek.train.loop import LossOutput
from deepseek.train.losses import autocast, mean_loss
from deepseek.train.trunk import run_above

Stream = Callable[[Batch], Tensor]
"""Where the frozen stream `[B, T, D]` of a batch comes from: computed, or read from a cache."""


class ExpertTask:
    """The module forced on at every token; everything else of the model frozen.

    Attributes:
        parameters: those of the module.
    """

    def __init__(
        self,
        model: Any,
        module: ExpertModule,
        head: CandidateHead,
        *,
        stream: Stream,
        held_out: Sequence[Batch],
        held_out_stream: Stream,
    ) -> None:
        """Train `module` on what `stream` gives, scored by `head`; `held_out` batches are scored exactly."""
        self.model, self.module, self.head, self.stream = model, module, head, stream
        self.held_out, self.held_out_stream = held_out, held_out_stream
        self.layer = module.layers[0]
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())

    def loss(self, batch: Batch, step: int) -> LossOutput:
        """Return the loss of one batch of packed rows."""
        labels_N = batch.labels.flatten()
        loss = self.head.loss(self.hidden(batch, self.stream(batch)).flatten(0, 1), labels_N, step)
        return LossOutput(loss, int((labels_N != IGNORED_LABEL).sum()))

    def evaluate(self) -> dict[str, float]:
        """Return the exact loss on held-out rows with the module on."""
        return {"held_out_loss": mean_loss(self.held_out_losses()).loss}

    def held_out_losses(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the losses and labels `[N]` of each held-out batch."""
        for batch in self.held_out:
            yield self.score(batch, self.held_out_stream(batch)), batch.labels.flatten()

    @torch.no_grad()
    def score(self, batch: Batch, stream_BTD: Tensor) -> Tensor:
        """Return the exact loss `[N]` of every token of a batch, 0 where ignored."""
        hidden_ND = self.hidden(batch, stream_BTD).flatten(0, 1)
        return token_losses(hidden_ND, self.model.lm_head.weight, batch.labels.flatten())

    def hidden(self, batch: Batch, stream_BTD: Tensor) -> Tensor:
        """Return the normed last hidden states `[B, T, D]` with the module forced on."""
        with self.model.experts.forced(self.module), autocast(self.model.device):
            return run_above(self.model, self.layer, batch, stream_BTD.to(self.model.device, self.model.dtype))
