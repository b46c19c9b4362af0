"""The table of relevance of an expert, in closed form: which words speak for its domain, and how
loudly.

A token's evidence is the log-ratio of its frequency in the expert's own text to its largest
frequency in any kind of public text (conversations in fifteen languages, prose, source code,
descriptions):

    table[v] = log max_k p_own,k(v) - log max_g p_public,g(v),   cut to [-LEAST, MOST]

Summed over a text, that is at most its log-likelihood ratio against each kind, so that a domain
must be likelier than all of them: a German manual's expert is not asked because a text is German.
It is cross-entropy difference as for the selection of training text (Moore and Lewis, 2010) with a
robust background. A word that is in neither is no evidence for a domain, and the more of the domain
has been read, the more it is evidence against.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.model.experts.relevance import Relevance, text_evidence

PRIOR_TOKENS = 200.0
"""Tokens that the prior counts for in each frequency (a Dirichlet prior)."""

LEAST = 1.0
MOST = 8.0
"""Most that one token says against a domain and for it, in nats. Everyday words are poor evidence
against: a question about a domain is made of them but for a name or two."""

THRESHOLD = 5.0
"""Evidence that a conversation must give to admit the only expert plugged, in nats."""

PIECE = 64
"""Tokens of the pieces by which recall is measured."""


@dataclass(frozen=True)
class Background:
    """Everything that an expert's domain is told from.

    Attributes:
        counts_GV: tokens of each kind of public text, seen or expected.
        chats: what users say in everyday conversations that are not counted, to measure errors by:
            ids of each.
    """

    counts_GV: Tensor
    chats: tuple[Tensor, ...]


@dataclass(frozen=True)
class RelevanceFit:
    """A table and its errors on text that it has not seen.

    Attributes:
        relevance: the table and its thresholds.
        admitted_chats: share of everyday conversations that admit the expert.
        admitted_own: share of pieces of `PIECE` tokens of held-out own text that do not rule it
            out.
    """

    relevance: Relevance
    admitted_chats: float
    admitted_own: float


def fit_relevance(
    own: Sequence[Tensor], held_out_N: Tensor, background: Background
) -> RelevanceFit:
    """Return the table of a domain.

    Args:
        own: token ids `[N]` of each kind of own text (documents, questions about them); the more
            the better.
        held_out_N: tokens of the same domain that are not among them.
        background: what the domain is told from.
    """
    counts_GV = background.counts_GV.double()
    prior_V = (counts_GV / counts_GV.sum(1, keepdim=True)).mean(0)
    prior_V = (prior_V + 1e-3 / len(prior_V)) / (1.0 + 1e-3)
    public_V = _frequencies(counts_GV, prior_V).amax(0)
    own_KV = torch.stack(
        [ids_N.bincount(minlength=len(prior_V)).double() for ids_N in own if len(ids_N)]
    )
    ratio_V = (_frequencies(own_KV, prior_V).amax(0) / public_V).log()
    table_V = ratio_V.clamp(-LEAST, MOST).half().float()
    means_G = (counts_GV @ table_V.double()) / counts_GV.sum(1)
    own_mean = float(table_V[held_out_N].double().mean())
    # Half-way between the own text and the kind of public text that resembles it most.
    offset = -(own_mean + float(means_G.max())) / 2.0
    relevance = Relevance(table_V, THRESHOLD, offset)
    chats = [text_evidence(relevance, ids_N) > THRESHOLD for ids_N in background.chats]
    pieces = held_out_N[: len(held_out_N) // PIECE * PIECE].view(-1, PIECE)
    own_text = [relevance.keeps(piece) for piece in pieces]
    return RelevanceFit(relevance, _share(chats), _share(own_text))


def _frequencies(counts: Tensor, prior_V: Tensor) -> Tensor:
    """Return frequencies `[..., V]` with the prior mixed in."""
    return (counts + PRIOR_TOKENS * prior_V) / (counts.sum(-1, keepdim=True) + PRIOR_TOKENS)


def _share(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / max(1, len(outcomes))
