"""Arguments of the compiled step beside matrices: norms, biases, attention windows and numbers."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from deepseek.compiled.positions import rotations
from deepseek.model.transformer import DeepSeekModel


def numbers(model: DeepSeekModel) -> dict[str, Any]:
    """Return the numbers of a model that are not sizes."""
    config = model.config
    scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
    embed_scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
    return {
        "eps": np.array([config.rms_norm_eps], np.float32),
        "clip": np.array([config.clip_qkv or 0], np.float32),
        "score_cap": np.array([config.attn_logit_softcapping or 0], np.float32),
        "logit_cap": np.array([config.final_logit_softcapping or 0], np.float32),
        "query_scale": np.array([scale], np.float32),
        "embed_scale": np.array([embed_scale], np.float32),
        "activation": int(config.hidden_act != "silu"),
    }


def small_arrays(model: DeepSeekModel) -> dict[str, Any]:
    """Return the weights of norms and head norms, the biases and the attention windows of all
    layers.
    """
    norms: list[torch.Tensor] = []
    post_norms: list[torch.Tensor] = []
    head_norms: list[torch.Tensor] = []
    qkv_biases: list[torch.Tensor] = []
    out_biases: list[torch.Tensor] = []
    windows: list[int] = []
    blocks: list[Any] = list(model.layers)
    for block in blocks:
        attention = block.attention
        norms += [block.attention_norm.scale(), block.feed_forward_norm.scale()]
        if model.config.post_norms:
            post_norms += [block.attention_post_norm.scale(), block.feed_forward_post_norm.scale()]
        if attention.normed:
            # Padded: over the full width, keys have fewer scales than queries.
            scales = [attention.q_norm.scale(), attention.k_norm.scale()]
            head_norms.append(pad_sequence(scales, batch_first=True))
        else:
            head_norms.append(torch.zeros(2, 0))
        qkv_biases.append(
            torch.cat(
                [_bias(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            )
        )
        out_biases.append(_bias(attention.o_proj))
        windows.append(model.config.sliding_window or 0 if attention.windowed else 0)
    return {
        "norms": _floats([*norms, model.norm.scale()]),
        "post_norms": _floats(post_norms).reshape(-1, model.config.hidden_size),
        "head_norms": _floats(head_norms),
        "qkv_bias": _floats(qkv_biases),
        "out_bias": _floats(out_biases),
        "windows": windows,
        "rotation": [int(rotations(model) > 1 and window > 0) for window in windows],
    }


def _bias(layer: nn.Linear) -> torch.Tensor:
    """Return a layer's bias, or zeros if it has none."""
    return (
        layer.bias
        if layer.bias is not None
        else torch.zeros(layer.out_features, dtype=torch.float32)
    )


def _floats(tensors: list[torch.Tensor]) -> np.ndarray:
    """Stack tensors into one fp32 array."""
    stacked = torch.stack(tensors) if tensors else torch.zeros(0)
    return np.ascontiguousarray(stacked.detach().float().numpy())
