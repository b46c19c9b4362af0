"""Growing routed experts beside a dense feed-forward network without changing what the model computes."""

import torch
from torch import Generator, Tensor

from deepseek.model.moe.layer import MoELayer

WHISPER = 1e-14
"""Scale of a new expert's output. It is lost in the rounding of the fp32 sum, so the model's logits keep their bits,
yet it is not zero, so the router has a gradient from the first step. Nothing larger will do: at 1e-9 a few last bits
of the residual stream flip, and 30 layers of SmolLM2 amplify them to 6e-5 in the logits (LOG.md, 2026-11-24)."""


@torch.no_grad()
def init_upcycled(layer: MoELayer, generator: Generator) -> None:
    """Initialise the routed experts of `layer`, whose `shared_experts` hold a dense network, so that it decides alone.

    Experts and router start random and so different from each other; only `down_proj` is scaled to a whisper. Its own
    gradient does not depend on that scale: the first optimiser step of usual size gives the experts a voice.
    """
    for weight, scale in (
        (layer.pool.gate_up_proj, 1.0),
        (layer.pool.down_proj, WHISPER),
        (layer.router.weight, 1.0),
    ):
        weight.copy_(_random(weight, generator) * scale)


def _random(weight: Tensor, generator: Generator) -> Tensor:
    """Return values that keep the variance of an input of unit variance."""
    return torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
