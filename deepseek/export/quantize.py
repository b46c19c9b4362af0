"""Quantise a model's weights to 8 or 4 bits, and check the result against the original."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deepseek import checks
from deepseek.checkpoint.convert import FAMILIES
from deepseek.checkpoint.files import new_path
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import atomic_folder, read_object
from deepseek.checkpoint.stream import TensorWriter
from deepseek.data.text.document import Progress, silent
from deepseek.device.choose import choose_device
from deepseek.errors import CheckpointError, ConfigError
from deepseek.export.calibrate import quantise_along, sample
from deepseek.model.language_model import is_own
from deepseek.model.pretrained import load_stored
from deepseek.model.quantised import is_large, stored_form, with_large_quantised
from deepseek.model.stored import StoredMatrix, stored_matrices
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import load_tokenizer

SENTENCE = (
    "The history of science is the study of how people came to know nature, step by step, from the "
    "stars to the"
)
LIMITS = {8: 0.05, 4: 0.5}
"""Bits -> largest divergence in nats. 8 bits cost about a tenth of it, 4 bits of a small model a
fifth.
"""

ROWS, LENGTH = 32, 64  # number of calibration texts, and tokens in each


@dataclass(frozen=True)
class Quantisation:
    """Result of quantising a model.

    Attributes:
        num_bytes: bytes of the weights written.
        ratio: `num_bytes` relative to the same weights in fp32.
        divergence: mean Kullback-Leibler divergence of the next-token distributions on a sentence,
            in nats.
    """

    num_bytes: int
    ratio: float
    divergence: float


@torch.inference_mode()
def quantize_model(
    base: str | Path, out: Path, *, bits: int = 8, device: str = "auto", progress: Progress = silent
) -> Quantisation:
    """Write a base model with 8-bit or 4-bit weights to a new folder, which `deepseek.load` reads
    like any other.

    The matrices of linear layers are quantised with calibration activations (GPTQ, see
    `kernels/int8.py`), layer by layer: memory is needed for one layer, and for the 8-bit model that
    writes the calibration texts.

    Args:
        base: a known base, a local folder or a hub id.
        out: the folder to create.
        bits: bits of a weight, 8 or 4; with 4, the embedding and the head have 8.
        device: where to calibrate and compare.
        progress: shows the progress.

    Returns:
        Size and accuracy of the result.

    Raises:
        ConfigError: `out` exists or cannot be written, or the model is too small or already
            quantised.
        CheckpointError: the quantised model's predictions diverge too far from the original's.
    """
    if checks.whole("bits", bits) not in LIMITS:
        raise ConfigError(f"bits={bits} is not possible; use 8 or 4.")
    new_path(out)
    progress(0, 0, f"loading {base}")
    folder = resolve(str(base))
    place = choose_device(device)
    model = _source(folder, base, place)
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer(SENTENCE).input_ids], device=place)
    elements = _elements(model)
    with atomic_folder(out) as written_folder:
        writer = TensorWriter(written_folder)
        _write_weights(model, writer, bits, progress)
        model.config.save_pretrained(written_folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(written_folder)
        tokenizer.save_pretrained(written_folder)
        progress(0, 0, "comparing with the original")
        written = load_stored(DeepSeekModel, written_folder, "float32", place)
        divergence = _divergence(model, written, ids)
        if not divergence < LIMITS[bits]:
            raise CheckpointError(
                f"The quantised model's predictions are {divergence:.3f} nats from those of "
                f"{base}, more than {LIMITS[bits]}; nothing was written. Use "
                f"{'8 bits' if bits == 4 else 'the model in bf16'}."
            )
    return Quantisation(writer.num_bytes, writer.num_bytes / (4 * elements), divergence)


def _source(folder: Path, base: str | Path, device: torch.device) -> DeepSeekModel:
    """Return the model to quantise, its matrices in its files.

    Raises:
        ConfigError: it is of a foreign family, too small, or already quantised.
    """
    raw = read_object(folder / "config.json")
    if not is_own(raw):
        raise ConfigError(
            f"Quantisation is for our own families ({', '.join(FAMILIES)}), and {base} is of type "
            f"{raw.get('model_type')!r}; use it as it is."
        )
    model = load_stored(DeepSeekModel, folder, "float32", device)
    matrices = [*stored_matrices(model).values()]
    for matrix in matrices:
        if matrix.bits is not None:
            raise ConfigError(
                f"{base} has {matrix.bits}-bit weights already; quantise the model that they were "
                "made from."
            )
    if not any(is_large(matrix.name, matrix.shape) for matrix in matrices):
        raise ConfigError(
            f"{base} has no matrix of at least 64 columns to quantise; use it as it is."
        )
    return model


def bits_of(name: str, bits: int) -> int:
    """Return the bits of a matrix of a model that is quantised to `bits`.

    Head and embedding are more sensitive than the layers (docs/log/quantisation.md).
    """
    return bits if name.startswith("layers.") else 8


def _write_weights(
    model: DeepSeekModel, writer: TensorWriter, bits: int, progress: Progress
) -> None:
    """Write all weights of a model, quantised."""
    stored = {matrix.name: matrix for matrix in stored_matrices(model).values()}
    count = len(stored)
    texts = sample(model, ROWS, LENGTH, progress).to(model.device)
    done = set()
    for name, matrix in quantise_along(model, texts, partial(bits_of, bits=bits)):
        writer.add(stored_form(name, matrix))
        done.add(name)
        progress(len(done), count, "quantising matrices")
    for name in sorted(stored.keys() - done):
        writer.add({name: _whole(stored[name])})
    writer.add(with_large_quantised(model.own_tensors()))
    writer.close()


def _whole(matrix: StoredMatrix) -> Tensor:
    return matrix.rows(0, matrix.shape[0])


def _elements(model: DeepSeekModel) -> int:
    """Return the number of weights of a model."""
    stored = sum(matrix.shape[0] * matrix.shape[1] for matrix in stored_matrices(model).values())
    return stored + sum(tensor.numel() for tensor in model.own_tensors().values())


def _divergence(model: DeepSeekModel, other: DeepSeekModel, ids: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of `other` from `model` over the positions of a
    text, in nats.
    """
    p, q = (
        network(ids, use_cache=False).logits[0].cpu().double().log_softmax(-1)
        for network in (model, other)
    )
    return float((p.exp() * (p - q)).sum(-1).mean())
