"""Differences between the predictions of two models."""

from torch import Tensor


def divergence(wanted_TV: Tensor, found_TV: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of `found_TV` from `wanted_TV`, in nats.

    Args:
        wanted_TV, found_TV: log probabilities `[..., V]`.
    """
    return float((wanted_TV.exp() * (wanted_TV - found_TV)).double().sum(-1).mean())


def same_likeliest(wanted_TV: Tensor, found_TV: Tensor) -> float:
    """Return the share of positions at which both have the same most likely token.

    Args:
        wanted_TV, found_TV: log probabilities `[..., V]`.
    """
    return float((wanted_TV.argmax(-1) == found_TV.argmax(-1)).double().mean())
