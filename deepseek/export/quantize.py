"""Quantise a model's weights to 8 bits or fewer, and check the result against the original."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from deepseek import checks
from deepseek.checkpoint.convert import FAMILIES
from deepseek.checkpoint.files import new_path
from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.licence import copy_terms
from deepseek.checkpoint.output import new_folder
from deepseek.checkpoint.store import canonical_json, home, read_object
from deepseek.checkpoint.stream import TensorWriter
from deepseek.data.text.document import Progress, silent
from deepseek.device.choose import choose_device
from deepseek.errors import CheckpointError, ConfigError
from deepseek.export.calibrate import Bits, quantise_along, sample
from deepseek.export.kept import KeptParts
from deepseek.export.sensitivity import costs, with_8_bits
from deepseek.model.language_model import is_own
from deepseek.model.pretrained import load_stored, read_config
from deepseek.model.quantised import is_large, stored_form, with_large_quantised
from deepseek.model.stored import StoredMatrix, stored_matrices
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import load_tokenizer

SENTENCE = (
    "The history of science is the study of how people came to know nature, step by step, from the "
    "stars to the"
)
LIMIT, LIMIT_BELOW_8 = 0.05, 0.5
"""Largest divergence in nats, with 8 bits and with less. 8 bits cost about a tenth of it, 4 bits of
a small model a third.
"""

TEXTS_OF_8, TEXTS_BELOW_8 = (32, 64), (64, 128)
"""Calibration texts and tokens in each, with 8 bits and with less. With 4 bits, four times the
tokens lower the divergence of SmolLM2 by a sixth; with 8 bits little is left to gain.
"""


METHOD = 1
"""Version of the method; increase it when the same matrices are quantised differently, so that
layers kept by an interrupted call of an earlier version are not reused.
"""


def texts_shape(bits: float) -> tuple[int, int]:
    """Return the number of calibration texts for `bits` a weight, and of the tokens in each."""
    return TEXTS_OF_8 if bits == 8 else TEXTS_BELOW_8


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


@torch.no_grad()
def quantize_model(
    base: str | Path,
    out: Path,
    *,
    bits: float = 8,
    device: str = "auto",
    progress: Progress = silent,
) -> Quantisation:
    """Write a base model with weights of 8 bits or fewer to a new folder, which `deepseek.load`
    reads like any other.

    The matrices of linear layers are quantised with calibration activations (GPTQ, see
    `kernels/int8.py`), layer by layer: memory is needed for one layer, and for the 8-bit model that
    writes the calibration texts. An interrupted call keeps its finished layers, and the same call
    resumes after them.

    Args:
        base: a known base, a local folder or a hub id.
        out: the folder to create.
        bits: mean number of bits of the layers' weights, from 4 to 8; default: 8. Between the two,
            the matrices that 4 bits would cost most have 8 (`sensitivity.py`). The embedding and
            the head always have 8.
        device: where to calibrate and compare.
        progress: shows the progress.

    Returns:
        Size and accuracy of the result.

    Raises:
        ConfigError: `out` exists, appears meanwhile, is being written by another process or cannot
            be written, or the model is too small or already quantised.
        CheckpointError: the quantised model's predictions diverge too far from the original's.
    """
    bits = checks.number("bits", bits, least=4, most=8)
    new_path(out)
    progress(0, 0, f"loading {base}")
    folder = resolve(str(base))
    place = choose_device(device)
    model = quantisable(folder, base, place)
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer(SENTENCE).input_ids], device=place)
    elements = _elements(model)
    kept = KeptParts(_kept_folder(folder, bits, place))
    with new_folder(out) as written_folder:
        writer = TensorWriter(written_folder)
        _write_weights(model, writer, bits, kept, progress)
        model.config.save_pretrained(written_folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(written_folder)
        tokenizer.save_pretrained(written_folder)
        copy_terms(folder, written_folder)
        progress(0, 0, "comparing with the original")
        written = load_stored(DeepSeekModel, written_folder, "float32", place)
        divergence = _divergence(model, written, ids)
        limit = LIMIT if bits == 8 else LIMIT_BELOW_8
        if not divergence < limit:
            kept.remove()
            raise CheckpointError(
                f"The quantised model's predictions are {divergence:.3f} nats from those of "
                f"{base}, more than {limit}; nothing was written. Use "
                f"{'the model in bf16' if bits == 8 else 'more bits'}."
            )
    kept.remove()
    return Quantisation(writer.num_bytes, writer.num_bytes / (4 * elements), divergence)


def quantisable(folder: Path, base: str | Path, device: torch.device) -> DeepSeekModel:
    """Return the model to quantise, with its matrices left in the files.

    Args:
        folder: its folder.
        base: its name in messages.
        device: where to calibrate and compare.

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


def _kept_folder(folder: Path, bits: float, device: torch.device) -> Path:
    """Return the folder for the finished parts of a model's quantisation."""
    weights = fingerprint(folder).weights
    config = sha256(canonical_json(read_config(folder))).hexdigest()  # the layers' inputs change
    key = f"{METHOD} {weights} {config} {bits:g} {device.type} {TEXTS_OF_8} {TEXTS_BELOW_8}"
    return home() / "quantising" / sha256(key.encode()).hexdigest()[:16]


def choose_bits(
    model: DeepSeekModel, texts: Tensor, bits: float, kept: KeptParts, progress: Progress
) -> Bits:
    """Return the bits of each matrix of a model whose layers have `bits` a weight on average.

    Head and embedding are more sensitive than the layers (docs/log/quantisation.md).
    """
    if bits == 8:
        return lambda _: 8
    rows, length = TEXTS_OF_8  # enough to rank the costs
    wide: set[str] = set()
    if bits > 4:
        wide = kept.names(lambda: with_8_bits(costs(model, texts[:rows, :length], progress), bits))
    return lambda name: 4 if name.startswith("layers.") and name not in wide else 8


def _write_weights(
    model: DeepSeekModel, writer: TensorWriter, bits: float, kept: KeptParts, progress: Progress
) -> None:
    """Write all weights of a model, quantised."""
    stored = {matrix.name: matrix for matrix in stored_matrices(model).values()}
    count = len(stored)
    rows, length = texts_shape(bits)
    texts = kept.texts(lambda: sample(model, rows, length, progress)).to(model.device)
    bits_of = choose_bits(model, texts, bits, kept, progress)
    done = set()
    for name, matrix in quantise_along(model, texts, bits_of, kept):
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
