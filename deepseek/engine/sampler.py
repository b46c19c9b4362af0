"""Sampling: from logits to the next token.

NumPy, one sequence at a time. The forward pass keeps the cores busy, and for one row of logits the
synchronisation of threads would cost more than it saves.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek import checks
from deepseek.checks import Check, number, optional, whole
from deepseek.errors import ConfigError, shown

Logits = NDArray[np.float32]

FLOORS = (1e-3, 1e-5, 0.0)
"""Relative probability floors for the candidate search; a lower floor is tried only if the tokens
above the previous one do not suffice.
"""

BLOCK = 64
"""Size of the blocks of tokens whose largest weights bound the search for the likeliest tokens."""

COLD = 1e-4
"""Temperatures below this choose the likeliest token, because dividing by them would overflow."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        max_new_tokens: maximum number of tokens to generate.
        temperature: 0 to 10; 0 (or below 0.0001) takes the likeliest token, higher values flatten
            the distribution.
        top_k: sample from the k likeliest tokens only; 0 means all.
        top_p: sample from the smallest set of likeliest tokens whose total probability, among those
            that `top_k` leaves, reaches this value; 1 means all, 0 the likeliest one.
        min_p: sample only tokens whose probability is at least this fraction of the likeliest
            token's; 0 means all.
        repetition_penalty: divides the positive logits of tokens in the prompt or the text, and
            multiplies the negative ones (1 = off, at least 0.01; arXiv:1909.05858).
        presence_penalty: subtracted from the logits of tokens that were generated already; -2 to 2.
        frequency_penalty: subtracted likewise, once for each occurrence; -2 to 2.
        logit_bias: token id -> value added to its logit, -100 to 100.
        seed: seed of the random generator; the same seed gives the same text. None draws one.

    Raises:
        ConfigError: a value is out of range.
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
        checks.apply(SAMPLING, self)


def _biases(name: str, value: Any) -> dict[int, float]:
    """Return a checked `logit_bias`: token id -> value from -100 to 100."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}={shown(value)} must be a mapping of token ids to numbers.")
    return {
        whole(f"{name} key", token, least=0): number(f"{name}[{token}]", bias, least=-100, most=100)
        for token, bias in value.items()
    }


_penalty = partial(number, least=-2, most=2)

SAMPLING: dict[str, Check] = {
    "max_new_tokens": partial(whole, least=1),
    "temperature": partial(number, least=0, most=10),
    "top_k": partial(whole, least=0),
    "top_p": partial(number, least=0, most=1),
    "min_p": partial(number, least=0, below=1),
    "repetition_penalty": partial(number, least=0.01, most=1e6),
    "presence_penalty": _penalty,
    "frequency_penalty": _penalty,
    "logit_bias": _biases,
    "seed": optional(whole),
}
"""Type and range of each field of `Sampling`."""


class Sampler:
    """Chooses the tokens of one sequence; the choice depends on nothing outside the sequence.

    Args:
        sampling: the sampling parameters.
        prompt_ids: tokens of the prompt, for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self._prompt = list(prompt_ids)
        self._written: Counter[int] = Counter()
        self._generator = np.random.default_rng(
            None if sampling.seed is None else sampling.seed % 2**64
        )

    def next_token(self, logits_V: Logits, allowed_V: NDArray[np.bool_] | None = None) -> int:
        """Choose the next token and count it as generated.

        Args:
            logits_V: logits `[V]` of the next token.
            allowed_V: mask `[V]`, False at tokens that must not be chosen; None allows all.

        Returns:
            The id of the token.
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
        """Return the logits with penalties and biases applied."""
        sampling = self.sampling
        generated_ids = list(self._written)
        if sampling.repetition_penalty != 1.0:
            logits_V = penalise(
                logits_V, [*self._prompt, *generated_ids], sampling.repetition_penalty
            )
        if generated_ids and (sampling.presence_penalty or sampling.frequency_penalty):
            counts = np.array(list(self._written.values()))
            logits_V = raised(
                logits_V,
                generated_ids,
                -(sampling.presence_penalty + sampling.frequency_penalty * counts),
            )
        if sampling.logit_bias:
            logits_V = raised(
                logits_V, list(sampling.logit_bias), np.array(list(sampling.logit_bias.values()))
            )
        return logits_V


def penalise(logits_V: Logits, seen: Sequence[int], penalty: float) -> Logits:
    """Return the logits with those of the tokens `seen` lowered: positive ones divided by
    `penalty`, negative ones multiplied.
    """
    ids = np.array(seen, dtype=np.int64)
    changed_V = logits_V.copy()
    values = logits_V[ids]
    changed_V[ids] = np.where(values > 0, values / penalty, values * penalty)
    return changed_V


def raised(logits_V: Logits, ids: Sequence[int], added: NDArray[np.float64]) -> Logits:
    """Return the logits with `added` added at `ids`, which must be distinct."""
    changed_V = logits_V.copy()
    changed_V[np.array(ids)] += added.astype(np.float32)
    return changed_V


def admitted(weights_V: Logits, sampling: Sampling) -> NDArray[np.int64] | None:
    """Return the ids of the tokens that pass top-k, then top-p among these, then min-p, likeliest
    first.

    Args:
        weights_V: probabilities up to a common factor.
        sampling: the sampling parameters.

    Returns:
        The ids; None if every token passes.
    """
    if sampling.top_p == 1.0 and sampling.min_p == 0.0 and not sampling.top_k:
        return None
    nucleus = np.inf
    if sampling.top_p < 1.0 and not sampling.top_k:
        nucleus = sampling.top_p * weights_V.sum(dtype=np.float64)
    ids = likely(weights_V, sampling, nucleus)
    ids = ids[np.argsort(-weights_V[ids])]
    if sampling.top_k:
        ids = ids[: sampling.top_k]
    ordered = weights_V[ids].astype(np.float64)
    if sampling.top_p < 1.0 and sampling.top_k:
        nucleus = sampling.top_p * ordered.sum()
    keep = ordered.cumsum() - ordered < nucleus  # the token that crosses the threshold still counts
    keep[0] = True
    keep &= ordered >= sampling.min_p * ordered[0]
    return ids[keep]


def likely(weights_V: Logits, sampling: Sampling, nucleus: float) -> NDArray[np.int64]:
    """Return candidate ids in ascending order, which include every token that can pass.

    Usually few tokens pass, all of them likely ones, so the whole vocabulary need not be sorted.

    Args:
        weights_V: probabilities `[V]`, up to a common factor.
        sampling: the sampling parameters.
        nucleus: the total weight at which top-p is reached; infinite without top-p, or where top-k
            comes first.
    """
    blocks = len(weights_V) // BLOCK
    if 0 < sampling.top_k <= blocks:
        # At least `top_k` blocks have a token at or above this floor.
        largest = weights_V[: blocks * BLOCK].reshape(blocks, BLOCK).max(axis=1)
        place = blocks - sampling.top_k
        return above(weights_V, np.partition(largest, place)[place])
    # Top-p is applied to the tokens that top-k leaves, including those that min-p removes.
    min_p = 0.0 if sampling.top_k and sampling.top_p < 1.0 else sampling.min_p
    likeliest = weights_V.max()
    for floor in FLOORS:
        ids = above(weights_V, floor * likeliest)
        found_weight = weights_V[ids].sum(dtype=np.float64)
        if min_p >= floor or 0 < sampling.top_k <= len(ids) or found_weight > nucleus:
            break
    return ids


def above(weights_V: Logits, floor: np.float32) -> NDArray[np.int64]:
    """Return the ids of the weights at or above `floor`; with a floor of 0, the positive ones."""
    return np.flatnonzero(weights_V >= floor if floor > 0 else weights_V > 0)


def draw(weights_V: Logits, generator: np.random.Generator) -> int:
    """Draw an index with probability proportional to its weight, from one random number."""
    sums_V = weights_V.cumsum(dtype=np.float64)
    point = generator.random() * sums_V[-1]
    # The first cumulative sum above the point. Rounding can put the point on the last sum; then the
    # first index that reaches this sum is the one to return.
    return int(min(np.searchsorted(sums_V, point, "right"), np.searchsorted(sums_V, sums_V[-1])))
