"""Quantise the layers of a model one after the other, with calibration activations.

Only one layer's weights are in memory at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from deepseek.data.text.document import Progress, silent
from deepseek.engine.runners import reference_runner
from deepseek.engine.start import quickest_runner
from deepseek.export.kept import KeptParts
from deepseek.kernels.int8 import BLOCK_ELEMENTS, Compensation, Int8Matrix, quantize
from deepseek.model.passes import begin, resume
from deepseek.model.quantised import is_large
from deepseek.model.stored import StoredLinear, StoredMatrix, stored_matrices
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk

SPAN = 4096
"""Maximum columns of a matrix that compensate for each other's errors; the cost grows with the cube
of the span.
"""

BATCH = 16
"""Calibration texts in one forward pass."""

Bits = Callable[[str], int]
"""Name of a matrix -> bits of its values."""


@torch.no_grad()
def sample(model: DeepSeekModel, rows: int, length: int, progress: Progress = silent) -> Tensor:
    """Generate the calibration texts `[rows, length]` with the model itself, from random first
    tokens.

    The seed is fixed, so the texts are the same every time. A model too large to be kept in memory
    writes them with 8-bit weights, if the compiled runner supports it.
    """
    large = any(not matrix.keeps for matrix in stored_matrices(model).values())
    runner = quickest_runner(model) if large else reference_runner(model)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab_size, (rows, 1), generator=generator)
    states = [runner.start(None, length) for _ in range(rows)]
    while ids_BT.shape[1] < length:
        chunks = [
            Chunk(state, [int(token)]) for state, token in zip(states, ids_BT[:, -1], strict=True)
        ]
        probabilities_BV = runner.forward(chunks).logits_RV.float().softmax(-1)
        next_B1 = probabilities_BV.multinomial(1, generator=generator)
        ids_BT = torch.cat((ids_BT, next_B1), 1)
        progress(ids_BT.shape[1], length, "writing calibration texts")
    return ids_BT


class Grams:
    """Second moments of the inputs of linear layers, collected during forward passes.

    Layers that read the same tensor share theirs.

    Args:
        module: the module that holds the layers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._source: dict[str, str] = {}  # name of a layer -> first layer with the same input
        self._sums: dict[str, list[Tensor]] = {}
        self._compensations: dict[str, list[Compensation]] = {}
        self._last: tuple[str, Tensor] | None = None
        self._hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name: self.add(name, args[0]))
            for name, layer in module.named_modules(remove_duplicate=False)
            if isinstance(layer, StoredLinear)
        ]

    def compensations(self, name: str) -> list[Compensation] | None:
        """Return the error compensation of each span of a layer's columns; None if the layer has
        seen no inputs.
        """
        source = self._source.get(name)
        if source is None:
            return None
        if source not in self._compensations:
            self._compensations[source] = [*map(Compensation.of, self._sums[source])]
        return self._compensations[source]

    def groups(self) -> list[list[str]]:
        """Return the names of the layers that have read the same tensors, group by group."""
        groups: dict[str, list[str]] = {}
        for name, source in self._source.items():
            groups.setdefault(source, []).append(name)
        return list(groups.values())

    def close(self) -> None:
        """Stop collecting."""
        for hook in self._hooks:
            hook.remove()
        self._last = None

    def add(self, name: str, x: Tensor) -> None:
        """Add the inputs `[..., D]` of a layer."""
        if self._last is not None and self._last[1] is x:
            self._source[name] = self._last[0]
            return
        self._source[name] = name
        self._last = (name, x)
        x_ND = x.detach().flatten(0, -2).float()
        parts = [part.T @ part for part in x_ND.split(SPAN, -1)]
        sums = self._sums.setdefault(name, [torch.zeros_like(part) for part in parts])
        for total, part in zip(sums, parts, strict=True):
            total.add_(part)


def quantised_rows(
    stored: StoredMatrix, spans: list[Compensation] | None, bits: int
) -> Iterator[Int8Matrix]:
    """Quantise a matrix a block of rows at a time.

    Args:
        stored: the matrix.
        spans: compensation for each span of columns; None: round to the nearest.
        bits: bits of a weight.
    """
    outputs, width = stored.shape
    step = max(64, BLOCK_ELEMENTS // width)
    for first in range(0, outputs, step):
        weight_FD = stored.rows(first, min(first + step, outputs)).float()
        if spans is None:
            yield quantize(weight_FD, bits=bits)
            continue
        parts = [
            quantize(part_FD, span, bits)
            for part_FD, span in zip(weight_FD.split(SPAN, -1), spans, strict=True)
        ]
        yield Int8Matrix(
            torch.cat([part.values for part in parts], -1),
            torch.cat([part.scales for part in parts], -1),
            width,
            bits,
        )


def quantised(stored: StoredMatrix, spans: list[Compensation] | None, bits: int) -> Int8Matrix:
    """Return a quantised matrix (see `quantised_rows`)."""
    parts = [*quantised_rows(stored, spans, bits)]
    return Int8Matrix(
        torch.cat([part.values for part in parts]).cpu(),
        torch.cat([part.scales for part in parts]).cpu(),
        stored.shape[1],
        bits,
    )


@torch.inference_mode()
def quantise_along(
    model: DeepSeekModel, ids_BT: Tensor, bits: Bits, kept: KeptParts
) -> Iterator[tuple[str, Int8Matrix]]:
    """Quantise the stored matrices of a model along forward passes of calibration texts.

    A layer is calibrated with the inputs that the quantised layers below give.

    Args:
        model: a model whose matrices are stored (`load_stored`).
        ids_BT: calibration texts.
        bits: bits of each matrix.
        kept: layers that an interrupted call has quantised already.

    Yields:
        Name of the weight and quantised matrix, in the order of the layers. A head that shares the
        embedding's weights comes under the embedding's name.
    """
    hidden_BTD = torch.cat([begin(model, ids).hidden_BTD for ids in ids_BT.split(BATCH)])
    for layer, block in enumerate(model.layers):
        with in_memory(block) as matrices:
            compute = partial(quantised_layer, model, hidden_BTD, layer, matrices, bits)
            done = kept.layer(layer, compute)
            for stored in matrices.values():
                if stored.name in done:
                    stored.hold(done[stored.name].float().to(hidden_BTD.device))
            hidden_BTD = run_layer(model, hidden_BTD, layer)
        yield from done.items()
    yield from _quantised_ends(model, hidden_BTD, bits)


def quantised_layer(
    model: DeepSeekModel,
    hidden_BTD: Tensor,
    layer: int,
    matrices: dict[str, StoredMatrix],
    bits: Bits,
) -> dict[str, Int8Matrix]:
    """Return the quantised matrices of a layer, which has `matrices` in memory, by their names."""
    grams = Grams(model.layers[layer])
    run_layer(model, hidden_BTD, layer)
    grams.close()
    return {
        stored.name: quantised(stored, grams.compensations(path), bits(stored.name))
        for path, stored in matrices.items()
        if is_large(stored.name, stored.shape)
    }


def _quantised_ends(
    model: DeepSeekModel, hidden_BTD: Tensor, bits: Bits
) -> Iterator[tuple[str, Int8Matrix]]:
    """Quantise the head and the embedding.

    A shared matrix is calibrated for the head's inputs: this helps the head more than it costs the
    embedding.
    """
    grams = Grams(nn.Module())
    head = model.lm_head
    for part_BTD in hidden_BTD.split(BATCH):
        final_BTD = resume(model, part_BTD, len(model.layers)).finish()
        if isinstance(head, StoredLinear):
            grams.add("lm_head", final_BTD)
    grams.close()
    for path, stored in stored_matrices(model).items():
        if not path.startswith("layers.") and is_large(stored.name, stored.shape):
            is_head = isinstance(head, StoredLinear) and stored is head.stored
            spans = grams.compensations("lm_head") if is_head else None
            yield stored.name, quantised(stored, spans, bits(stored.name))


def run_layer(model: DeepSeekModel, hidden_BTD: Tensor, layer: int) -> Tensor:
    """Return the residual stream after a layer."""
    parts = [resume(model, part, layer).run_to(layer + 1) for part in hidden_BTD.split(BATCH)]
    return torch.cat(parts)


@contextmanager
def in_memory(block: nn.Module) -> Iterator[dict[str, StoredMatrix]]:
    """Hold the matrices of a block in memory; yield them by the names of their layers."""
    matrices = stored_matrices(block)
    for stored in matrices.values():
        stored.hold(stored.rows(0, stored.shape[0]))
    try:
        yield matrices
    finally:
        for stored in matrices.values():
            stored.hold(None)
