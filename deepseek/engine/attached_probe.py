"""Probe a stock model on a few tokens before an engine runs it: how much memory its cache takes,
and whether the model can continue a text from it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from deepseek.errors import ConfigError, shown
from deepseek.model.attached.model import AttachedModel

LARGEST_MIX = 0.05
"""Largest allowed relative change of logits by another sequence that is computed in between.

On a CPU the same kernels compute the same numbers twice, so it is 0; on a GPU, some kernels sum in
any order. RecurrentGemma, which keeps its state in its modules, has 0.1 in every dtype on a tiny
random model, whose state matters less than that of a trained one.
"""


@dataclass(frozen=True)
class LayerBytes:
    """Memory of one layer of a cache: a constant, and bytes per token up to a window."""

    constant: int
    per_token: int
    window: int | None

    def at(self, length: int) -> int:
        """Return the bytes after `length` tokens."""
        tokens = length if self.window is None else min(length, self.window)
        return self.constant + self.per_token * tokens


def measure(model: AttachedModel) -> list[LayerBytes]:
    """Return the memory of a model's cache by layer, measured after 8 and after 16 tokens.

    Args:
        model: the model.

    Raises:
        ConfigError: the model does not continue from a stock cache as it does from the text.
    """
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()  # dropout would make any two passes differ
        # Without autocast, as in the engine's thread.
        with torch.autocast(model.device.type, enabled=False), model.expert_hooks.running(None):
            layers, lost, mixed = _probe(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as cause:  # a family's code may raise anything
        raise _unfit(model, f"it raises {shown(cause)}") from cause
    finally:
        for module in training:
            module.training = True
    if mixed > LARGEST_MIX:
        raise _unfit(model, f"another text in between changes logits by {mixed:.0%}")
    if lost > _largest_error(model):
        raise _unfit(model, f"logits differ by {lost:.0%} from those of one pass")
    return layers


def _unfit(model: AttachedModel, reason: str) -> ConfigError:
    return ConfigError(
        f"A {type(model).__name__} cannot continue a text from a cache by several tokens "
        f"({reason}), as an engine does; use model.generate."
    )


@torch.inference_mode()
def _probe(model: AttachedModel) -> tuple[list[LayerBytes], float, float]:
    """Return the memory of a model's cache, and how far the logits of 8 tokens after 8 others are
    from those of one pass, and from those with another sequence computed in between.
    """
    first, second = torch.arange(16, device=model.device)[None].chunk(2, dim=1)
    cache = new_cache(model)
    sizes = []
    for ids in (first, second):
        parts = _logits(model, ids, cache)
        sizes.append([tensor_bytes(layer) for layer in cache.layers])
    layers = []
    for layer, before, after in zip(cache.layers, *sizes, strict=True):
        per_token = -(-(after - before) // 8)
        window = getattr(layer, "sliding_window", None)
        layers.append(LayerBytes(max(0, after - 16 * per_token), per_token, window))
    cache = new_cache(model)
    _logits(model, first, cache)
    whole = _logits(model, torch.cat([first, second], dim=1), new_cache(model))
    interrupted = _logits(model, second, cache)
    return layers, _error(parts, whole), _error(interrupted, parts)


def new_cache(model: AttachedModel) -> Cache:
    """Return an empty cache of the classes that `generate` would choose."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _logits(model: AttachedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Return the logits of the last 8 tokens, minus the mean over each token's logits.

    A constant added to all logits of a token changes no probability, and would hide differences.
    """
    output: Any = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=8)
    logits_TV: Tensor = output.logits[0, -8:].float()
    return logits_TV - logits_TV.mean(-1, keepdim=True)


def _error(found_TV: Tensor, expected_TV: Tensor) -> float:
    """Return the median over tokens of the relative error: norm of the difference / norm."""
    error_T = (found_TV - expected_TV).norm(dim=-1) / expected_TV.norm(dim=-1)
    # The median, because rounding may send single tokens to another expert of a mixture.
    return float(error_T.median())


def _largest_error(model: AttachedModel) -> float:
    """Return the largest relative error against one pass that may be rounding.

    Of tiny random models of 120 families, correct ones have errors up to 1e-6 in fp32, 3e-3 in fp16
    (like TF32) and 3e-2 in bf16; ones that lose state have errors of 2e-2 to 0.9 in every dtype,
    and larger ones once trained, because their state then matters more. Rounding errors grow with
    depth and with quantised weights or activations, so the bound for these has a wide margin.
    """
    exact = all(parameter.dtype.itemsize >= 4 for parameter in model.parameters())
    quantised = getattr(model, "hf_quantizer", None) is not None or any(
        "quant" in type(module).__module__ for module in model.modules()
    )
    return 0.01 if exact and not quantised else 0.2


def tensor_bytes(value: Any) -> int:
    """Return the bytes of the tensors in a tuple, list or dict, or in an object's attributes."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(tensor_bytes(part) for part in value.values())
    if isinstance(value, tuple | list):
        return sum(tensor_bytes(part) for part in value)
    return tensor_bytes(vars(value)) if hasattr(value, "__dict__") else 0
