"""Estimate what `quantize_model` will take, from one layer that is quantised and thrown away."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from deepseek import checks
from deepseek.checkpoint.files import new_path
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.stream import FILE_BYTES
from deepseek.data.text.document import Progress, silent
from deepseek.device.choose import choose_device
from deepseek.device.estimate import Estimate
from deepseek.device.memory import peak_memory, synchronize
from deepseek.export.calibrate import BATCH, in_memory, quantised_layer, run_layer, sample
from deepseek.export.quantize import quantisable, texts_shape
from deepseek.kernels.int8_layout import GROUP
from deepseek.model.passes import begin
from deepseek.model.quantised import is_large
from deepseek.model.stored import stored_matrices
from deepseek.model.transformer import DeepSeekModel

SCALE_BYTES = 2 / GROUP
"""Bytes of the scales, which are in bf16, for each quantised weight."""


@torch.no_grad()
def estimate_quantisation(
    base: str | Path,
    out: Path,
    *,
    bits: float = 8,
    device: str = "auto",
    progress: Progress = silent,
) -> Estimate:
    """Return what the same call of `quantize_model` will take, without writing anything.

    A part of the calibration texts is written, and one layer is quantised; the rest is in
    proportion.

    Args:
        base: a known base, a local folder or a hub id.
        out: the folder that would be created.
        bits: mean number of bits of the layers' weights, from 4 to 8; default: 8.
        device: where to calibrate and compare.
        progress: shows the progress.

    Raises:
        ConfigError: as `quantize_model`, as far as it can be known before.
    """
    bits = checks.number("bits", bits, least=4, most=8)
    new_path(out)
    progress(0, 0, f"loading {base}")
    place = choose_device(device)
    model = quantisable(resolve(str(base)), base, place)
    rows, length = texts_shape(bits)
    ids_BT = torch.randint(model.config.vocab_size, (rows, length), device=place)
    progress(0, 0, "quantising one layer to measure it")
    before = peak_memory(place)
    forward, quantising = _seconds_of_layer(model, ids_BT, bits)
    size = written_bytes(model, bits)
    buffered = min(size, FILE_BYTES)  # until a file is full
    if all(matrix.keeps for matrix in stored_matrices(model).values()):
        sample(model, rows, 2)  # reads the weights
        sampling = _seconds(lambda: sample(model, rows, 3), place) / 2 * length
        # The original is kept in fp32, and so is the result, which is compared with it.
        memory = peak_memory(place) + buffered + 4 * _count(model)
    else:
        # The 8-bit model that writes the texts is rounded from the files, and computes as many
        # tokens as the calibration.
        sampling = 2 * forward * len(model.layers)
        memory = max(peak_memory(place) + buffered, before + written_bytes(model, 8))
    layers = len(model.layers) * (forward + quantising)
    costs = 0.0 if bits in (4, 8) else layers  # of 4 bits, for each matrix
    in_layers = _count(model.layers)
    ends = len(model.layers) * quantising * (_count(model) - in_layers) / in_layers
    seconds = sampling + costs + layers + ends
    return Estimate(f"{size / 1e9:.2f} GB to write", seconds, memory, place)


def written_bytes(model: DeepSeekModel, bits: float) -> int:
    """Return the bytes of the weights that a quantisation writes.

    Args:
        model: a model whose matrices are stored (`load_stored`).
        bits: mean number of bits of the layers' weights.
    """
    written = 0.0
    for matrix in stored_matrices(model).values():
        of_weight = bits if matrix.name.startswith("layers.") else 8
        written += _bytes(matrix.name, matrix.shape, of_weight)
    for name, tensor in model.own_tensors().items():
        written += _bytes(name, tuple(tensor.shape), 8, tensor.element_size())
    return round(written)


def _bytes(name: str, shape: tuple[int, ...], bits: float, plain: int = 4) -> float:
    """Return the bytes of a tensor, quantised if it is large, else of `plain` bytes an element."""
    return math.prod(shape) * (bits / 8 + SCALE_BYTES if is_large(name, shape) else plain)


def _count(module: nn.Module) -> int:
    """Return the number of weights in the stored matrices of a module."""
    return sum(math.prod(matrix.shape) for matrix in stored_matrices(module).values())


def _seconds_of_layer(model: DeepSeekModel, ids_BT: Tensor, bits: float) -> tuple[float, float]:
    """Return the seconds of a forward pass of calibration texts through the middle layer, and
    those of its quantisation.
    """
    layer = len(model.layers) // 2
    hidden_BTD = torch.cat([begin(model, ids_BT).hidden_BTD for ids_BT in ids_BT.split(BATCH)])
    with in_memory(model.layers[layer]) as matrices:
        forward = _seconds(lambda: run_layer(model, hidden_BTD, layer), model.device)
        quantising = _seconds(
            lambda: quantised_layer(
                model, hidden_BTD, layer, matrices, lambda _: 8 if bits == 8 else 4
            ),
            model.device,
        )
    return forward, quantising


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a piece of work takes."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started
