"""Fit an expert's relevance table in closed form: the evidence of each token for its domain.

A token's evidence is the log-ratio of its frequency in the expert's own text to its largest
frequency in any kind of public text (conversations in fifteen languages, the words of these
languages, prose, source code, descriptions):

    table[v] = log max_k p_own,k(v) - log max_g p_public,g(v),   clipped to [-LEAST, MOST]

Summed over a text, this is at most the log-likelihood ratio against each kind, so that the domain
must be likelier than all of them: German text alone does not admit the expert of a German manual.
It is the cross-entropy difference of training data selection (Moore and Lewis, 2010) with a robust
background. A word that occurs in neither is not evidence for a domain; the more text of the domain
was read, the stronger its absence counts against it.

Pairs of neighbouring tokens have a table of the same kind. Documents are judged by it: passages of
other public texts are scored too, and a document is ruled out if it scores no better than nearly
all of these.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.model.experts.relevance import (
    DOCUMENT_DECAY,
    PASSAGE,
    PASSAGE_WEIGHT,
    RULED_OUT,
    Relevance,
    pair_slots,
    text_evidence,
    token_weights,
)
from deepseek.packs.manifest import PAIR_SLOTS

PRIOR_TOKENS = 200.0
"""Weight of the Dirichlet prior in each frequency, in tokens."""

LEAST = 0.7
"""Largest evidence of one token against a domain, in nats. It is small, since a question about a
domain consists of everyday words, except for a name or two."""
PAIR_LEAST = 1.0
"""The same for a pair of tokens."""
MOST = 8.0
"""Largest evidence of one token or pair for a domain, in nats."""

THRESHOLD = 3.0
"""Evidence in nats at which a conversation admits the only plugged expert."""

PIECE = 64
"""Tokens per piece of text on which recall is measured."""

SPREADS = 1.5
"""An expert that is the only candidate is ruled out up to this many standard deviations above the
median of a kind of public text.
"""

QUARTILES_APART = 1.349
"""Distance between the quartiles of a normal distribution, in standard deviations."""

PAIR_PRIOR_TOKENS = 500.0
"""Weight of the prior in the frequencies of pairs, in tokens."""


@dataclass(frozen=True)
class Background:
    """Public text that a domain is compared with.

    Attributes:
        counts_GV: token counts of each kind of public text, observed or expected.
        chats: token ids of user messages in everyday conversations that are not counted, for
            measuring false positives.
        pairs_GS: counts of pairs of tokens in each kind of public text, at their `pair_slots`.
        passages: token ids `[N, PASSAGE]` of passages of each kind of public text; those of source
            code are not in the counts.
    """

    counts_GV: Tensor
    chats: tuple[Tensor, ...]
    pairs_GS: Tensor
    passages: tuple[Tensor, ...]


@dataclass(frozen=True)
class RelevanceFit:
    """A relevance table and its error rates on held-out text.

    Attributes:
        relevance: the table and its thresholds.
        admitted_chats: share of everyday conversations that admit the expert.
        admitted_own: share of held-out pieces of own text, `PIECE` tokens each, that admit the
            expert.
    """

    relevance: Relevance
    admitted_chats: float
    admitted_own: float


def fit_relevance(
    own: Sequence[Tensor], held_out_N: Tensor, background: Background
) -> RelevanceFit:
    """Return the relevance table of a domain.

    Args:
        own: token ids `[N]` of each kind of own text (documents, questions about them), the more
            the better.
        held_out_N: token ids of the same domain that are not in `own`.
        background: public text to compare with.
    """
    own_KV = torch.stack(
        [ids_N.bincount(minlength=background.counts_GV.shape[1]) for ids_N in own if len(ids_N)]
    )
    own_KS = torch.stack([count_pairs(ids_N) for ids_N in own if len(ids_N)])
    table_V = log_odds(own_KV, background.counts_GV, 1e-3, PRIOR_TOKENS, LEAST)
    pairs_S = log_odds(own_KS, background.pairs_GS, 1e-2, PAIR_PRIOR_TOKENS, PAIR_LEAST)
    relevance = Relevance(table_V, THRESHOLD, offset(pairs_S, background.passages), pairs_S)
    chats = [text_evidence(relevance, ids_N) > THRESHOLD for ids_N in background.chats]
    pieces = held_out_N[: len(held_out_N) // PIECE * PIECE].view(-1, PIECE)
    own_text = [relevance.keeps(piece) for piece in pieces]
    return RelevanceFit(relevance, _share(chats), _share(own_text))


def log_odds(
    own_KV: Tensor, public_GV: Tensor, flat: float, prior_tokens: float, least: float
) -> Tensor:
    """Return the evidence `[V]` of each token or pair for a domain, in nats.

    Args:
        own_KV: counts in each kind of own text.
        public_GV: counts in each kind of public text.
        flat: weight of a uniform distribution in the prior, relative to that of public text.
        prior_tokens: weight of the prior in each frequency, in tokens.
        least: largest evidence against the domain.
    """
    public_GV = public_GV.double()
    prior_V = (public_GV / public_GV.sum(1, keepdim=True)).mean(0)
    prior_V = (prior_V + flat / len(prior_V)) / (1.0 + flat)
    own_V, public_V = (
        _frequencies(counts.double(), prior_V, prior_tokens).amax(0)
        for counts in (own_KV, public_GV)
    )
    evidence_V = (own_V / public_V).log().clamp(-least, MOST)
    # Packs store fp16, so error rates are measured on these values.
    evidence_V = evidence_V.half().float()
    # With little own text the prior dominates: a token that it lacks must not count as evidence.
    return evidence_V.where(own_KV.sum(0) > 0, evidence_V.clamp(max=0.0))


def _frequencies(counts: Tensor, prior_V: Tensor, prior_tokens: float) -> Tensor:
    """Return frequencies `[..., V]` smoothed by the prior."""
    return (counts + prior_tokens * prior_V) / (counts.sum(-1, keepdim=True) + prior_tokens)


def count_pairs(ids_N: Tensor) -> Tensor:
    """Return the counts of the pairs of neighbouring tokens `[PAIR_SLOTS]`."""
    return pair_slots(ids_N[:-1], ids_N[1:]).bincount(minlength=PAIR_SLOTS)


def offset(pairs_S: Tensor, passages: Sequence[Tensor]) -> float:
    """Return the evidence per token, in nats, by which the passages of public text are ruled out.

    The bound is `SPREADS` standard deviations above the median of the kind of public text that is
    the most similar to the domain. The deviation is estimated by the quartiles: a few passages with
    the same licence text as the domain would make it several times larger.

    Args:
        pairs_S: evidence of pairs, in nats.
        passages: passages `[N, PASSAGE]` of each kind of public text.
    """
    weights_T = token_weights(PASSAGE, DOCUMENT_DECAY)[1:]
    bounds = []
    for ids_NT in passages:
        found_NT = pairs_S[pair_slots(ids_NT[:, :-1], ids_NT[:, 1:])].double()
        scores_N = (found_NT * weights_T).sum(1)
        low, median, high = (float(scores_N.quantile(share)) for share in (0.25, 0.5, 0.75))
        bounds.append(median + SPREADS * (high - low) / QUARTILES_APART)
    return (RULED_OUT - max(bounds)) / PASSAGE_WEIGHT


def _share(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / max(1, len(outcomes))
