"""Write a model with 8-bit weights, checked against the model that it comes from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deepseek.checkpoint.store import atomic_folder
from deepseek.engine.load import load
from deepseek.errors import CheckpointError, ConfigError
from deepseek.kernels.int8 import Int8Matrix, quantize
from deepseek.model.int8 import is_large, rounded
from deepseek.model.transformer import DeepSeekModel

SENTENCE = "The history of science is the study of how people came to know nature, step by step, from the stars to the"
LIMIT = 0.05  # nats; rounding to 8 bits costs a tenth of this
ROWS, LENGTH = 32, 64  # of text that the model writes to show what its matrices meet


@dataclass(frozen=True)
class Rounding:
    """What rounding a model did.

    Attributes:
        num_bytes: of the weights written.
        ratio: to those of the same weights in fp32.
        divergence: mean Kullback-Leibler divergence of the next-token distributions on a sentence,
            in nats.
    """

    num_bytes: int
    ratio: float
    divergence: float


@torch.inference_mode()
def quantize_model(base: str | Path, out: Path) -> Rounding:
    """Write `base` with 8-bit weights into the new folder `out`, which `deepseek.load` reads as it
    is.

    Raises:
        ConfigError: `out` exists, or the model is too small or already rounded.
        CheckpointError: what was written does not compute what the model does.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another folder or delete it.")
    model, tokenizer = load(base, dtype="float32")
    if any(hasattr(module, "int8") for module in model.modules()):
        raise ConfigError(
            f"{base} has 8-bit weights already; give the model that they were made from."
        )
    tensors = model.own_tensors()
    if not any(is_large(name, tensor) for name, tensor in tensors.items()):
        raise ConfigError(f"{base} has no matrix of at least 64 columns to round; use it as it is.")
    done = round_along(model, sample(model, ROWS, LENGTH))
    if model.config.tie_word_embeddings and "lm_head.weight" in done:
        done["embed_tokens.weight"] = done.pop(
            "lm_head.weight"
        )  # worth more to the head than it costs the embedding
    written = {name: tensor.contiguous() for name, tensor in rounded(tensors, done).items()}
    ids = torch.tensor([tokenizer(SENTENCE).input_ids])
    with atomic_folder(out) as folder:
        save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        divergence = _divergence(model, load(folder, dtype="float32").model, ids)
        if not divergence < LIMIT:
            raise CheckpointError(
                f"The rounded model's predictions are {divergence:.3f} nats from those of {base}, more than {LIMIT}; "
                "nothing was written. Its weights do not suit 8 bits; use it in bf16."
            )
    total = sum(tensor.nbytes for tensor in written.values())
    return Rounding(
        total, total / sum(4 * tensor.numel() for tensor in tensors.values()), divergence
    )


def sample(model: DeepSeekModel, rows: int, length: int) -> Tensor:
    """Return texts `[rows, length]` that the model writes from random first tokens on, the same
    every time.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = torch.randint(model.config.vocab_size, (rows, 1))
        texts: Tensor = model.generate(
            first, do_sample=True, top_k=0, max_new_tokens=length - 1, eos_token_id=-1
        )
        return texts


def round_along(model: DeepSeekModel, ids_BT: Tensor) -> dict[str, Int8Matrix]:
    """Return the matrices of linear layers, by name, rounded to suit what they meet in these
    texts.
    """
    done = {}

    def round_now(name: str, layer: nn.Linear, x: Tensor) -> None:
        x_ND = x.flatten(0, -2).float()
        done[name] = quantize(layer.weight, x_ND.T @ x_ND)

    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, name=f"{name}.weight": round_now(name, layer, args[0])
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and is_large(f"{name}.weight", layer.weight)
    ]
    model(ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return done


def _divergence(model: DeepSeekModel, other: DeepSeekModel, ids: Tensor) -> float:
    p, q = (one(ids, use_cache=False).logits[0].double().log_softmax(-1) for one in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())
