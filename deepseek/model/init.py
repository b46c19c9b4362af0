"""Initial weights."""

from torch import nn
from torch.nn.init import normal_, ones_, zeros_

from deepseek.model.moe.experts import Experts
from deepseek.model.moe.router import Router
from deepseek.model.norm import RMSNorm


def init_module(module: nn.Module, std: float) -> None:
    """Initialise the parameters that `module` itself owns: matrices normal with `std`, norms one,
    biases zero.
    """
    if isinstance(module, RMSNorm):
        ones_(module.weight)
    elif isinstance(module, (nn.Linear, nn.Embedding, Experts, Router)):
        for name, parameter in module.named_parameters(recurse=False):
            zeros_(parameter) if name == "bias" else normal_(parameter, std=std)
