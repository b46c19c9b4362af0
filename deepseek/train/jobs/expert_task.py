"""Task for training an expert module: loss on its own text and on replay, held-out score."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.data import Batch
from deepseek.device.transfer import to_device
from deepseek.kernels.cross_entropy import IGNORED_LABEL, CandidateHead, token_losses
from deepseek.model.experts import ExpertModule
from deepseek.model.language_model import LanguageModel, feed_forward, output_head
from deepseek.model.precision import autocast
from deepseek.train.gates.replay import Replay
from deepseek.train.loop.loop import LossOutput
from deepseek.train.loop.losses import mean_loss
from deepseek.train.loop.packed import resume_rows
from deepseek.train.text.trunk_cache import Stream

USUAL_OUTPUT = 1.0
"""Root mean square of a feed-forward network's output from which on the recipes' learning rates
apply in full. They were chosen for SmolLM2, whose layers have 1.1 to 80; see docs/log/experts.md.
"""


class ExpertTask:
    """Next-token loss with the module forced on at every token and the rest of the model frozen.

    Attributes:
        parameters: parameters of the module by name.
    """

    def __init__(
        self,
        model: LanguageModel,
        module: ExpertModule,
        head: CandidateHead,
        *,
        stream: Stream,
        held_out: Sequence[Batch],
        held_out_stream: Stream,
        replay: Replay | None = None,
    ) -> None:
        """Create the task.

        Args:
            model: frozen base model.
            module: expert to train.
            head: output head of the training loss.
            stream: gives the trunk's hidden states of a training batch.
            held_out: batches that `evaluate` scores with the whole output head.
            held_out_stream: gives the trunk's hidden states of a held-out batch.
            replay: public text to train on in the same steps; default: none.
        """
        self.model = model
        self.module = module
        self.head = head
        self.stream = stream
        self.replay = replay
        self.held_out = held_out
        self.held_out_stream = held_out_stream
        self.layer = module.layers[0]
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())

    def loss(self, batch: Batch, step: int) -> LossOutput:
        """Return the loss of one batch of packed rows and of the step's replay rows.

        `tokens` in the result counts the batch without the replay.
        """
        parts = [(batch, self.stream(batch))]
        if self.replay is not None:
            parts.append(self.replay.at(step))
        hidden_ND = torch.cat(
            [self.hidden(rows, stream_BTD).flatten(0, 1) for rows, stream_BTD in parts]
        )
        labels_N = torch.cat([rows.labels.flatten() for rows, _ in parts])
        return LossOutput(
            self.head.loss(hidden_ND, labels_N, step), int((batch.labels != IGNORED_LABEL).sum())
        )

    def evaluate(self) -> dict[str, float]:
        """Return the exact loss on held-out rows with the module on."""
        return {"held_out_loss": self.loss_on(self.held_out, self.held_out_stream)}

    def loss_on(self, batches: Sequence[Batch], stream: Stream) -> float:
        """Return the exact mean loss on batches with the module on, in nats per token."""
        parts = ((self.score(rows, stream(rows)), rows.labels.flatten()) for rows in batches)
        return mean_loss(parts).loss

    @torch.no_grad()
    def score(self, batch: Batch, stream_BTD: Tensor) -> Tensor:
        """Return the exact loss `[N]` of every token of a batch, 0 for ignored labels."""
        hidden_ND = self.hidden(batch, stream_BTD).flatten(0, 1)
        head = output_head(self.model)
        return token_losses(hidden_ND, head.weight_VD, batch.labels.flatten(), head.cap)

    def hidden(self, batch: Batch, stream_BTD: Tensor) -> Tensor:
        """Return the final normed hidden states `[B, T, D]` with the module forced on."""
        with self.model.experts.forced(self.module), autocast(self.model):
            stream_BTD = to_device(stream_BTD, self.model.device, self.model.dtype)
            return resume_rows(self.model, batch, stream_BTD, self.layer).finish()


def output_paces(
    model: LanguageModel, layers: Sequence[int], batch: Batch, stream_BTD: Tensor
) -> dict[str, float]:
    """Return the paces (see `OptimConfig`) of an expert's down projections, which grow from zero.

    An optimizer step moves every weight by about the learning rate, whatever the scale of the
    model. Where the base's own feed-forward network adds little to the residual stream, a full step
    would drown it out.

    Args:
        model: frozen base model.
        layers: layers of the expert, ascending.
        batch: packed rows.
        stream_BTD: their residual stream at the first of `layers`, see `run_trunk`.
    """
    sizes = output_rms(model, layers, batch, stream_BTD)
    return {
        f"ffn.{layer}.down_proj": min(1.0, size / USUAL_OUTPUT) for layer, size in sizes.items()
    }


@torch.no_grad()
def output_rms(
    model: LanguageModel, layers: Sequence[int], batch: Batch, stream_BTD: Tensor
) -> dict[int, float]:
    """Return the root mean square of the outputs of the base's own feed-forward modules, by layer;
    its experts take no part.
    """
    found: dict[int, float] = {}

    def record(layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        y: Tensor = output[0] if isinstance(output, tuple) else output
        found[layer] = float(y.float().square().mean().sqrt())

    hooks = [
        feed_forward(model, layer).register_forward_hook(partial(record, layer)) for layer in layers
    ]
    try:
        with model.experts.arming(None), autocast(model):
            stream_BTD = to_device(stream_BTD, model.device, model.dtype)
            resume_rows(model, batch, stream_BTD, layers[0]).finish()
    finally:
        for hook in hooks:
            hook.remove()
    return found
