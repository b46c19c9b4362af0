"""The reference for a compiled runner: the model with the runner's quantised weights."""

import copy

import torch
from torch import nn

from deepseek.kernels.int8 import quantize
from deepseek.model.moe.experts import Experts
from deepseek.model.transformer import DeepSeekModel


def quantised_twin(model: DeepSeekModel) -> DeepSeekModel:
    """Return a copy with weights quantised to 8 bits, except routers."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data = quantize(module.weight.data).float()
        elif isinstance(module, Experts):
            for weight in (module.gate_up_proj, module.down_proj):
                weight.data = torch.stack([quantize(expert).float() for expert in weight.data])
    return twin
