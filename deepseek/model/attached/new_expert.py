"""Create an expert for an attached model, initialised with rows of the model's own weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepseek.model.attached.model import AttachedModel
from deepseek.model.attached.traits import layers_of
from deepseek.model.experts.module import ExpertModule

GATE_AND_UP = (("gate_proj", "up_proj"), ("w1", "w3"))
"""Names of the gate and the up projection in a gated feed-forward network."""

FUSED = "gate_up_proj"
"""Name of a fused projection: the rows of the gate, then those of the up projection."""


def attached_expert(
    model: AttachedModel, name: str, layers: Sequence[int], width: int, seed: int
) -> ExpertModule:
    """Return a new fp32 expert on the device of an attached model; its output is initially zero.

    The gate and up projections are copied from rows of the layer's own feed-forward network if that
    is gated and has at least `width` rows, and are random otherwise.

    Args:
        model: the model.
        name: name of the expert.
        layers: layers that get an expert layer.
        width: width F of the expert layers.
        seed: seed of the initial weights.

    Raises:
        ConfigError: a layer has no feed-forward module.
    """
    sites = model.expert_hooks.sites
    paths = [sites.at(layer).path for layer in layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = ExpertModule(name, layers, sites.hidden_size, width)
    for layer, path in zip(layers, paths, strict=True):
        rows = gate_and_up(model.get_submodule(path), sites.hidden_size)
        if rows is not None and len(rows[0]) >= width:
            module.at(layer).copy_rows(*rows, seed + layer)
    return module.to(next(layers_of(model).parameters()).device)


def gate_and_up(ffn: nn.Module, hidden_size: int) -> tuple[Tensor, Tensor] | None:
    """Return gate and up weights `[F, D]` of a gated feed-forward network, else None."""
    fused = getattr(getattr(ffn, FUSED, None), "weight", None)
    pairs = [] if fused is None else [fused.chunk(2)]
    for names in GATE_AND_UP:
        weights = [getattr(getattr(ffn, name, None), "weight", None) for name in names]
        if all(isinstance(weight, Tensor) for weight in weights):
            pairs.append((weights[0], weights[1]))
    for gate, up in pairs:
        if gate.shape == up.shape and gate.is_floating_point() and gate.shape[1:] == (hidden_size,):
            return gate, up
    return None
