"""From logits to the next token."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek.errors import ConfigError

FEW = 256
"""Likeliest tokens that are looked at first when the others are to be cut off."""

COLD = 1e-4
"""Temperatures below this choose the likeliest token; dividing by them would overflow."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: most tokens to generate.
        temperature: 0 (or below 0.0001) takes the likeliest token; higher values spread the choice.
        top_k: only the k likeliest tokens (0 = all).
        top_p: only the likeliest tokens that together hold this probability.
        min_p: only tokens at least this fraction as likely as the likeliest.
        repetition_penalty: divides the logits of tokens already seen (1 = off; arXiv:1909.05858).
        presence_penalty: is taken off the logits of tokens that were generated already.
        frequency_penalty: likewise, once for each time that they were.
        logit_bias: token id -> what is added to its logit.
        seed: same seed, same text; None draws one.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _check(0.0 <= self.temperature <= 10.0, "temperature", self.temperature, "between 0 and 10")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        _check(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")
        _check(0.0 <= self.min_p < 1.0, "min_p", self.min_p, "at least 0 and below 1")
        _check(self.repetition_penalty > 0.0, "repetition_penalty", self.repetition_penalty, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(-2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "between -2 and 2")
        for bias in self.logit_bias.values():
            _check(-100.0 <= bias <= 100.0, "logit_bias", bias, "between -100 and 100")


def _check(holds: bool, name: str, value: float, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value} is out of range; it must be {rule}.")


class Sampler:
    """Chooses the tokens of one sequence; what it chooses depends on nothing else.

    Args:
        prompt_ids: the tokens before the first one that it chooses.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self._prompt = list(prompt_ids)
        self._written: Counter[int] = Counter()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def next_token(self, logits_V: Tensor, allowed_V: Tensor | None = None) -> int:
        """Return the id of the next token and count it as written.

        Args:
            logits_V: its logits `[V]` in fp32, on the CPU.
            allowed_V: False at tokens that must not come; None allows all.
        """
        logits_V = self._adjust(logits_V)
        if allowed_V is not None:
            logits_V = logits_V.masked_fill(~allowed_V, -torch.inf)
        if self.sampling.temperature < COLD:
            token = int(logits_V.argmax())
        else:
            probabilities_V = torch.softmax(logits_V / self.sampling.temperature, dim=-1)
            token = draw(truncate(probabilities_V, self.sampling), self._generator)
        self._written[token] += 1
        return token

    def _adjust(self, logits_V: Tensor) -> Tensor:
        """Return the logits with penalties and biases."""
        wanted = self.sampling
        if wanted.repetition_penalty != 1.0:
            logits_V = penalise(logits_V, torch.tensor([*self._prompt, *self._written]), wanted.repetition_penalty)
        if self._written and (wanted.presence_penalty or wanted.frequency_penalty):
            counts = torch.tensor(list(self._written.values()))
            malus = wanted.presence_penalty + wanted.frequency_penalty * counts
            logits_V = logits_V.index_add(0, torch.tensor(list(self._written)), -malus)
        if wanted.logit_bias:
            bias = torch.tensor(list(wanted.logit_bias.values()))
            logits_V = logits_V.index_add(0, torch.tensor(list(wanted.logit_bias)), bias)
        return logits_V


def penalise(logits_V: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were `seen` less likely: positive logits are divided by `penalty`, negative multiplied."""
    values = logits_V[seen]
    return logits_V.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))


def truncate(probabilities_V: Tensor, sampling: Sampling) -> Tensor:
    """Return `probabilities_V` with all but the tokens that top-k, top-p and min-p admit set to 0 (unnormalised)."""
    if sampling.top_p == 1.0 and sampling.min_p == 0.0 and not sampling.top_k:
        return probabilities_V
    # Few tokens are admitted as a rule, and finding these is much faster than sorting the vocabulary.
    for count in (min(FEW, len(probabilities_V)), len(probabilities_V)):
        ordered, ids = probabilities_V.topk(count)
        keep = ordered.cumsum(-1) - ordered < sampling.top_p  # the token that crosses the threshold still counts
        keep &= ordered >= sampling.min_p * ordered[0]
        if sampling.top_k:
            keep[sampling.top_k :] = False
        if not keep[-1]:
            break
    return torch.zeros_like(probabilities_V).index_put((ids[keep],), ordered[keep])


def draw(weights_V: Tensor, generator: torch.Generator) -> int:
    """Return an index with probability proportional to its weight, from one random number."""
    sums_V = weights_V.double().cumsum(-1)
    point = torch.rand((), generator=generator, dtype=torch.double) * sums_V[-1]
    # The first sum above the point; the point may round up to the last sum, whose first place is meant then.
    return int(min(torch.searchsorted(sums_V, point, right=True), torch.searchsorted(sums_V, sums_V[-1])))
