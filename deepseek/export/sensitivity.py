"""Choose the matrices with 8 bits when a model's layers have 4 to 8 bits a weight on average.

Quantisation changes the residual stream after a layer by dh. To second order the divergence of the
predictions is E[(g . dh)^2] / 2, where g is the gradient of the log probability of a token that the
model draws itself: the Fisher information is the Hessian of the divergence (as HAWQ weighs layers
by the Hessian, arXiv:1911.03852). Calibration texts are such tokens. The positions of a text are
taken as independent, which is closer to the measured divergence than their noisier joint sum
(docs/log/quantisation.md). The costs of all matrices take one pass down through the layers, with
one layer's weights in memory at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.data.text.document import Progress, silent
from deepseek.export.calibrate import BATCH, Grams, in_memory, quantised, run_layer
from deepseek.kernels.cross_entropy import linear_cross_entropy
from deepseek.model.passes import begin, resume
from deepseek.model.quantised import is_large
from deepseek.model.stored import StoredMatrix
from deepseek.model.transformer import DeepSeekModel


@dataclass(frozen=True)
class Cost:
    """Cost of 4 bits for matrices of a layer that read the same input and are packed together.

    Attributes:
        names: names of the weights.
        size: number of their weights.
        divergence: increase of the divergence with 4 bits, in nats a token.
    """

    names: tuple[str, ...]
    size: int
    divergence: float


@torch.no_grad()
def costs(model: DeepSeekModel, ids_BT: Tensor, progress: Progress = silent) -> list[Cost]:
    """Return the cost of 4 bits for each group of matrices of the layers.

    Args:
        model: a model whose matrices are stored (`load_stored`).
        ids_BT: calibration texts, drawn by the model.
        progress: shows the progress.
    """
    count = len(model.layers)
    streams = [torch.cat([begin(model, ids).hidden_BTD for ids in ids_BT.split(BATCH)])]
    for layer, block in enumerate(model.layers):
        with in_memory(block):
            streams.append(run_layer(model, streams[-1], layer))
        progress(layer + 1, 2 * count, "measuring what 4 bits cost")
    gradient_BTD = _gradient_above(model, streams.pop(), ids_BT)
    found: list[Cost] = []
    for layer in reversed(range(count)):
        of_layer, gradient_BTD = _costs_of_layer(model, layer, streams.pop(), gradient_BTD)
        found += of_layer
        progress(2 * count - layer, 2 * count, "measuring what 4 bits cost")
    return found


def _costs_of_layer(
    model: DeepSeekModel, layer: int, entering_BTD: Tensor, gradient_BTD: Tensor
) -> tuple[list[Cost], Tensor]:
    """Return the costs of one layer, and the gradient with respect to the residual stream that
    enters it, `[B, T, D]`.

    Args:
        model: the model.
        layer: index of the layer.
        entering_BTD: the residual stream that enters it, `[B, T, D]`.
        gradient_BTD: gradient of the texts' log probability with respect to the residual stream
            that leaves it, `[B, T, D]`.
    """
    found = []
    tokens = len(entering_BTD) * (entering_BTD.shape[1] - 1)
    with in_memory(model.layers[layer]) as matrices:
        grams = Grams(model.layers[layer])
        with torch.enable_grad():
            exact_BTD = run_layer(model, entering_BTD.requires_grad_(), layer)
        grams.close()
        (entering_gradient_BTD,) = torch.autograd.grad(exact_BTD, entering_BTD, gradient_BTD)
        for paths in grams.groups():
            group = [matrices[path] for path in paths if _counts(matrices.get(path))]
            if not group:
                continue
            weights = [stored.tensor() for stored in group]
            for stored in group:
                rounded = quantised(stored, grams.compensations(paths[0]), 4)
                stored.hold(rounded.float().to(exact_BTD.device))
            change_BTD = run_layer(model, entering_BTD, layer) - exact_BTD
            for stored, weight in zip(group, weights, strict=True):
                stored.hold(weight)
            scores_BT = (change_BTD * gradient_BTD).sum(-1)
            divergence = float(scores_BT.square().sum() / (2 * tokens))
            size = sum(weight.numel() for weight in weights)
            found.append(Cost(tuple(stored.name for stored in group), size, divergence))
    return found, entering_gradient_BTD


def _counts(stored: StoredMatrix | None) -> bool:
    """Return whether a matrix is to be quantised."""
    return stored is not None and is_large(stored.name, stored.shape)


@torch.enable_grad()
def _gradient_above(model: DeepSeekModel, last_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the gradient of the texts' log probability, up to its sign, with respect to the
    residual stream after the last layer, `[B, T, D]`.
    """
    last_BTD.requires_grad_()
    final_BTD = resume(model, last_BTD, len(model.layers)).finish()
    labels_N = ids_BT[:, 1:].flatten()
    loss = linear_cross_entropy(
        final_BTD[:, :-1].flatten(0, 1),
        model.lm_head.weight,
        labels_N,
        cap=model.config.final_logit_softcapping,
    )
    return torch.autograd.grad(loss * len(labels_N), last_BTD)[0]


def with_8_bits(found: list[Cost], bits: float) -> set[str]:
    """Return the names of the matrices that get 8 bits, those with the highest cost per weight.

    Args:
        found: costs of all matrices of the layers.
        bits: mean number of bits of a weight, from 4 to 8; the result stays below it by less than
            the largest group adds.
    """
    room = (bits - 4) / 4 * sum(cost.size for cost in found)
    chosen: set[str] = set()
    for cost in sorted(found, key=lambda cost: cost.divergence / cost.size, reverse=True):
        if cost.size <= room:
            room -= cost.size
            chosen.update(cost.names)
    return chosen
