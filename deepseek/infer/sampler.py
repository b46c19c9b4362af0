"""From logits to the next token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token; higher values spread the choice.
        top_k: only the k likeliest tokens (0 = all).
        top_p: only the likeliest tokens that together hold this probability.
        min_p: only tokens at least this fraction as likely as the likeliest.
        repetition_penalty: divides the logits of tokens already seen (1 = off; arXiv:1909.05858).
        seed: same seed, same text; None draws one.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _check(0.0 <= self.temperature <= 10.0, "temperature", self.temperature, "between 0 and 10")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        _check(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")
        _check(0.0 <= self.min_p < 1.0, "min_p", self.min_p, "at least 0 and below 1")
        _check(self.repetition_penalty > 0.0, "repetition_penalty", self.repetition_penalty, "above 0")


def _check(holds: bool, name: str, value: float, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value} is out of range; it must be {rule}.")


class Sampler:
    """Chooses the tokens of one sequence."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def next_token(self, logits_V: Tensor, seen: Tensor) -> int:
        """Return the id of the next token, given its logits `[V]` and the ids seen so far `[T]`."""
        logits_V = penalise(logits_V.float(), seen, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0.0:
            return int(logits_V.argmax())
        probabilities_V = truncate(torch.softmax(logits_V / self.sampling.temperature, dim=-1), self.sampling)
        return int(torch.multinomial(probabilities_V, 1, generator=self.generator))


def penalise(logits_V: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were `seen` less likely: positive logits are divided by `penalty`, negative multiplied."""
    if penalty == 1.0:
        return logits_V
    values = logits_V[seen]
    return logits_V.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))


def truncate(probabilities_V: Tensor, sampling: Sampling) -> Tensor:
    """Return `probabilities_V` with all but the tokens that top-k, top-p and min-p admit set to 0 (unnormalised)."""
    ordered, ids = probabilities_V.sort(descending=True)
    keep = ordered.cumsum(-1) - ordered < sampling.top_p  # the token that crosses the threshold still counts
    keep &= ordered >= sampling.min_p * ordered[0]
    if sampling.top_k:
        keep[sampling.top_k :] = False
    return torch.zeros_like(probabilities_V).index_put((ids[keep],), ordered[keep])
