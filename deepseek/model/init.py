"""Weight initialisation."""

from torch import nn
from torch.nn.init import constant_, normal_, zeros_

from deepseek.model.moe.experts import Experts
from deepseek.model.moe.router import Router
from deepseek.model.norm import RMSNorm


def init_module(module: nn.Module, std: float) -> None:
    """Initialise the parameters of `module`, but not those of its submodules.

    Matrices are drawn from a normal distribution with standard deviation `std`; norms start with
    factors of one, and biases at zero.
    """
    if isinstance(module, RMSNorm):
        constant_(module.weight, 0.0 if module.offset else 1.0)
    elif isinstance(module, (nn.Linear, nn.Embedding, Experts, Router)):
        for name, parameter in module.named_parameters(recurse=False):
            zeros_(parameter) if name == "bias" else normal_(parameter, std=std)
