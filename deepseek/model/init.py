"""Weight initialisation."""

from torch import nn
from torch.nn.init import normal_, ones_, zeros_

from deepseek.model.moe.experts import Experts
from deepseek.model.moe.router import Router
from deepseek.model.norm import RMSNorm


def init_module(module: nn.Module, std: float) -> None:
    """Initialise the parameters of `module`, but not those of its submodules.

    Matrices are drawn from a normal distribution with standard deviation `std`; norms are set to
    one and biases to zero.
    """
    if isinstance(module, RMSNorm):
        ones_(module.weight)
    elif isinstance(module, (nn.Linear, nn.Embedding, Experts, Router)):
        for name, parameter in module.named_parameters(recurse=False):
            zeros_(parameter) if name == "bias" else normal_(parameter, std=std)
