"""Positions in the compiled step: rotary angles, and the parameters of score biases."""

from typing import Any

import numpy as np
import torch

from deepseek.kernels.bias.distance import NUM_BUCKETS
from deepseek.model.positions.alibi import AlibiBias
from deepseek.model.positions.dynamic import CONTEXTS, DynamicBias
from deepseek.model.positions.rope import Rope, Rotation
from deepseek.model.transformer import DeepSeekModel


def angles(model: DeepSeekModel, positions: int) -> dict[str, np.ndarray]:
    """Return the step's tables for each position below `positions`: `cosine`, `sine` and `growth`.

    Without rotary positions, heads are rotated by an angle of 0.
    """
    half = model.config.head_dim // 2
    position_ids = torch.arange(positions)
    cosine = np.ones((rotations(model), positions, half), np.float32)
    sine = np.zeros((rotations(model), positions, half), np.float32)
    if isinstance(model.positions, Rope):
        rotation: Rotation | None = model.positions.prepare(position_ids[None], torch.float32)
        for place in range(rotations(model)):
            assert rotation is not None
            cosine[place] = rotation.cos[0, 0, :, :half].numpy()
            sine[place] = rotation.sin[0, 0, :, :half].numpy()
            rotation = rotation.local
    bias = score_bias(model, 0)
    growth = bias.growth(position_ids) if isinstance(bias, DynamicBias) else np.zeros(positions)
    return {"cosine": cosine, "sine": sine, "growth": np.asarray(growth, np.float32)}


def rotations(model: DeepSeekModel) -> int:
    """Return the number of sets of rotary angles: 2 if windowed layers have their own, else 1."""
    return 1 if model.config.local_rope_theta is None else 2


def score_bias(model: DeepSeekModel, layer: int) -> object:
    """Return a layer's source of score biases; None: it has none."""
    attention: Any = model.layers[layer].attention
    source: object = attention.score_bias
    return source


@torch.no_grad()
def bias_arrays(model: DeepSeekModel) -> dict[str, np.ndarray]:
    """Return the parameters of all layers' score biases; empty arrays where there are none."""
    layers = len(model.layers)
    sources = [score_bias(model, layer) for layer in range(layers)]
    slopes = sources[0].slopes if isinstance(sources[0], AlibiBias) else []
    arrays: dict[str, Any] = {
        "signal_bias": np.zeros((layers, 0)),
        "bias_tables": np.zeros((layers, 0, CONTEXTS + 1, NUM_BUCKETS)),
        "decay": np.zeros((layers, 0)),
        "length_scale": np.zeros((layers, 0)),
    }
    dynamic = [source for source in sources if isinstance(source, DynamicBias)]
    if dynamic:
        parts: dict[str, list[torch.Tensor]] = {
            "signal_bias": [torch.cat((part.gate.bias, part.forget.bias)) for part in dynamic],
            "bias_tables": [part.tables() for part in dynamic],
            "decay": [part.decay() for part in dynamic],
            "length_scale": [part.length_scale_H for part in dynamic],
        }
        arrays = {name: torch.stack(tensors).float().numpy() for name, tensors in parts.items()}
    arrays["slopes"] = slopes
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
