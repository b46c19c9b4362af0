"""Quantise a model's weights to 8 bits, and check the result against the original."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LogitsProcessorList

from deepseek.checkpoint.files import new_path
from deepseek.checkpoint.store import atomic_folder
from deepseek.data.text.document import Progress, silent
from deepseek.engine.load import load
from deepseek.errors import CheckpointError, ConfigError
from deepseek.kernels.int8 import Int8Matrix, quantize
from deepseek.model.int8 import is_large, rounded
from deepseek.model.language_model import own_model
from deepseek.model.transformer import DeepSeekModel

SENTENCE = "The history of science is the study of how people came to know nature, step by step, from the stars to the"
LIMIT = 0.05  # nats; 8-bit quantisation typically costs a tenth of this
ROWS, LENGTH = 32, 64  # number of calibration texts, and tokens in each


@dataclass(frozen=True)
class Rounding:
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
    base: str | Path, out: Path, *, device: str = "auto", progress: Progress = silent
) -> Rounding:
    """Write a base model with 8-bit weights to a new folder, which `deepseek.load` reads like any
    other.

    The matrices of linear layers are quantised with calibration activations (GPTQ, see
    `kernels/int8.py`).

    Args:
        base: a known base, a local folder or a hub id.
        out: the folder to create.
        device: where to calibrate and compare.
        progress: shows the progress.

    Returns:
        Size and accuracy of the result.

    Raises:
        ConfigError: `out` exists or cannot be written, or the model is too small or already
            quantised.
        CheckpointError: the quantised model's predictions diverge too far from the original's.
    """
    new_path(out)
    progress(0, 0, f"loading {base}")
    loaded, tokenizer = load(base, device=device, dtype="float32")
    model = own_model(loaded, "Quantisation")
    if any(hasattr(module, "int8") for module in model.modules()):
        raise ConfigError(
            f"{base} has 8-bit weights already; quantise the model that they were made from."
        )
    tensors = model.own_tensors()
    if not any(is_large(name, tensor) for name, tensor in tensors.items()):
        raise ConfigError(
            f"{base} has no matrix of at least 64 columns to quantise; use it as it is."
        )
    quantised = round_along(model, sample(model, ROWS, LENGTH, progress), progress)
    if model.config.tie_word_embeddings and "lm_head.weight" in quantised:
        # Head and embedding share one matrix. Calibrating it for the head's inputs helps the head
        # more than it costs the embedding.
        quantised["embed_tokens.weight"] = quantised.pop("lm_head.weight")
    tensors_to_write = {
        name: tensor.contiguous() for name, tensor in rounded(tensors, quantised).items()
    }
    ids = torch.tensor([tokenizer(SENTENCE).input_ids], device=model.device)
    with atomic_folder(out) as folder:
        save_file(tensors_to_write, folder / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        progress(0, 0, "comparing with the original")
        written = DeepSeekModel.from_pretrained(folder, dtype="float32", device_map=model.device)
        divergence = _divergence(model, written, ids)
        if not divergence < LIMIT:
            raise CheckpointError(
                f"The quantised model's predictions are {divergence:.3f} nats from those of "
                f"{base}, more than {LIMIT}; nothing was written. Use the model in bf16."
            )
    total = sum(tensor.nbytes for tensor in tensors_to_write.values())
    return Rounding(
        total, total / sum(4 * tensor.numel() for tensor in tensors.values()), divergence
    )


def sample(model: DeepSeekModel, rows: int, length: int, progress: Progress = silent) -> Tensor:
    """Generate the calibration texts `[rows, length]` with the model itself, from random first
    tokens.

    The seed is fixed, so the texts are the same every time.
    """

    def report(ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        progress(ids_BT.shape[1], length, "writing calibration texts")
        return logits_BV

    with torch.random.fork_rng():
        torch.manual_seed(0)
        first_tokens = torch.randint(model.config.vocab_size, (rows, 1), device=model.device)
        texts: Tensor = model.generate(
            first_tokens,
            do_sample=True,
            top_k=0,
            max_new_tokens=length - 1,
            eos_token_id=-1,
            logits_processor=LogitsProcessorList([report]),
        )
        return texts


def round_along(
    model: DeepSeekModel, ids_BT: Tensor, progress: Progress = silent
) -> dict[str, Int8Matrix]:
    """Quantise the matrices of linear layers with calibration activations.

    Args:
        model: the model.
        ids_BT: calibration texts.
        progress: shows the progress.

    Returns:
        Name of the weight -> quantised matrix.
    """
    quantised = {}

    def quantise_layer(name: str, layer: nn.Linear, x: Tensor) -> None:
        x_ND = x.flatten(0, -2).float()
        quantised[name] = quantize(layer.weight, x_ND.T @ x_ND)
        progress(len(quantised), len(layers), "quantising matrices")

    layers = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and is_large(f"{name}.weight", layer.weight)
    }
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: quantise_layer(name, layer, args[0])
        )
        for name, layer in layers.items()
    ]
    model(ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return quantised


def _divergence(model: DeepSeekModel, other: DeepSeekModel, ids: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of `other` from `model` over the positions of a
    text, in nats.
    """
    p, q = (
        network(ids, use_cache=False).logits[0].cpu().double().log_softmax(-1)
        for network in (model, other)
    )
    return float((p.exp() * (p - q)).sum(-1).mean())
