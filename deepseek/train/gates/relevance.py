"""Fit an expert's relevance table in closed form: the evidence of each token for its domain.

A token's evidence is the log-ratio of its frequency in the expert's own text to its largest
frequency in any kind of public text (conversations in fifteen languages, prose, source code,
descriptions):

    table[v] = log max_k p_own,k(v) - log max_g p_public,g(v),   clipped to [-LEAST, MOST]

Summed over a text, this is at most the log-likelihood ratio against each kind, so that the domain
must be likelier than all of them: German text alone does not admit the expert of a German manual.
It is the cross-entropy difference of training data selection (Moore and Lewis, 2010) with a robust
background. A word that occurs in neither is not evidence for a domain; the more text of the domain
was read, the stronger its absence counts against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.model.experts.relevance import Relevance, text_evidence

PRIOR_TOKENS = 200.0
"""Weight of the Dirichlet prior in each frequency, in tokens."""

LEAST = 1.0
"""Largest evidence of one token against a domain, in nats. It is small, since a question about a
domain consists of everyday words but for a name or two."""
MOST = 8.0
"""Largest evidence of one token for a domain, in nats."""

THRESHOLD = 5.0
"""Evidence in nats at which a conversation admits the only plugged expert."""

PIECE = 64
"""Tokens of the pieces on which recall is measured."""


@dataclass(frozen=True)
class Background:
    """Public text that a domain is compared with.

    Attributes:
        counts_GV: token counts of each kind of public text, observed or expected.
        chats: token ids of user messages in everyday conversations that are not counted, for
            measuring false positives.
    """

    counts_GV: Tensor
    chats: tuple[Tensor, ...]


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
    # Centre the scores between the own text and the most similar kind of public text.
    offset = -(own_mean + float(means_G.max())) / 2.0
    relevance = Relevance(table_V, THRESHOLD, offset)
    chats = [text_evidence(relevance, ids_N) > THRESHOLD for ids_N in background.chats]
    pieces = held_out_N[: len(held_out_N) // PIECE * PIECE].view(-1, PIECE)
    own_text = [relevance.keeps(piece) for piece in pieces]
    return RelevanceFit(relevance, _share(chats), _share(own_text))


def _frequencies(counts: Tensor, prior_V: Tensor) -> Tensor:
    """Return frequencies `[..., V]` smoothed by the prior."""
    return (counts + PRIOR_TOKENS * prior_V) / (counts.sum(-1, keepdim=True) + PRIOR_TOKENS)


def _share(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / max(1, len(outcomes))
