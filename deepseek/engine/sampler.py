"""From logits to the next token.

In NumPy, one sequence at a time: the processor's cores belong to the forward pass, and threads that
wait for each other would cost more than they save on one row of logits.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deepseek.errors import ConfigError

Logits = NDArray[np.float32]

FLOORS = (1e-3, 1e-5, 0.0)
"""Tokens less likely than this beside the likeliest are looked at only when those above it are too
few.
"""

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
        repetition_penalty: divides the logits of tokens already seen (1 = off, at least 0.01;
            arXiv:1909.05858).
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
        _check(
            self.repetition_penalty >= 0.01,
            "repetition_penalty",
            self.repetition_penalty,
            "at least 0.01",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _check(
                -2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "between -2 and 2"
            )
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
        self._generator = np.random.default_rng(
            None if sampling.seed is None else sampling.seed % 2**64
        )

    def next_token(self, logits_V: Logits, allowed_V: NDArray[np.bool_] | None = None) -> int:
        """Return the id of the next token and count it as written.

        Args:
            logits_V: its logits `[V]`.
            allowed_V: False at tokens that must not come; None allows all.
        """
        logits_V = self._adjust(logits_V)
        if allowed_V is not None:
            logits_V = np.where(allowed_V, logits_V, -np.inf)
        if self.sampling.temperature < COLD:
            token = int(logits_V.argmax())
        else:
            weights_V = np.exp((logits_V - logits_V.max()) / np.float32(self.sampling.temperature))
            ids = admitted(weights_V, self.sampling)
            token = (
                draw(weights_V, self._generator)
                if ids is None
                else int(ids[draw(weights_V[ids], self._generator)])
            )
        self._written[token] += 1
        return token

    def _adjust(self, logits_V: Logits) -> Logits:
        """Return the logits with penalties and biases."""
        wanted = self.sampling
        written = list(self._written)
        if wanted.repetition_penalty != 1.0:
            logits_V = penalise(logits_V, [*self._prompt, *written], wanted.repetition_penalty)
        if written and (wanted.presence_penalty or wanted.frequency_penalty):
            counts = np.array(list(self._written.values()))
            logits_V = raised(
                logits_V, written, -(wanted.presence_penalty + wanted.frequency_penalty * counts)
            )
        if wanted.logit_bias:
            logits_V = raised(
                logits_V, list(wanted.logit_bias), np.array(list(wanted.logit_bias.values()))
            )
        return logits_V


def penalise(logits_V: Logits, seen: Sequence[int], penalty: float) -> Logits:
    """Make tokens that were `seen` less likely: positive logits are divided by `penalty`, negative
    multiplied.
    """
    ids = np.array(seen, dtype=np.int64)
    changed_V = logits_V.copy()
    values = logits_V[ids]
    changed_V[ids] = np.where(values > 0, values / penalty, values * penalty)
    return changed_V


def raised(logits_V: Logits, ids: Sequence[int], added: NDArray[np.float64]) -> Logits:
    """Return the logits with `added` to those of `ids`, all different."""
    changed_V = logits_V.copy()
    changed_V[np.array(ids)] += added.astype(np.float32)
    return changed_V


def admitted(weights_V: Logits, sampling: Sampling) -> NDArray[np.int64] | None:
    """Return the tokens that top-k, top-p and min-p all admit, likeliest first; None if every token
    is.

    Args:
        weights_V: probabilities up to a common factor.
    """
    if sampling.top_p == 1.0 and sampling.min_p == 0.0 and not sampling.top_k:
        return None
    nucleus = sampling.top_p * weights_V.sum(dtype=np.float64) if sampling.top_p < 1.0 else np.inf
    # Few tokens are admitted as a rule, and these are found among the likely ones, without sorting
    # the vocabulary.
    for floor in FLOORS:
        ids = np.flatnonzero(weights_V >= floor * weights_V.max())
        found = weights_V[ids].sum(dtype=np.float64)
        if sampling.min_p >= floor or 0 < sampling.top_k <= len(ids) or found > nucleus:
            break
    ids = ids[np.argsort(-weights_V[ids])]
    ordered = weights_V[ids].astype(np.float64)
    keep = ordered.cumsum() - ordered < nucleus  # the token that crosses the threshold still counts
    keep &= ordered >= sampling.min_p * ordered[0]
    if sampling.top_k:
        keep[sampling.top_k :] = False
    return ids[keep]


def draw(weights_V: Logits, generator: np.random.Generator) -> int:
    """Return an index with probability proportional to its weight, from one random number."""
    sums_V = weights_V.cumsum(dtype=np.float64)
    point = generator.random() * sums_V[-1]
    # The first sum above the point; the point may round up to the last sum, whose first place is
    # meant then.
    return int(min(np.searchsorted(sums_V, point, "right"), np.searchsorted(sums_V, sums_V[-1])))
