"""The table of relevance of an expert: log-odds of each token for its domain, by logistic regression on bags of tokens.

Positive examples are pieces of the expert's own text, negative ones pieces of public text of many kinds (conversations
in fifteen languages, prose, source code). The kinds are weighted by how badly they are told apart (group
distributionally robust optimisation, arXiv:1911.08731), so that a kind of which there is little counts as much as a
common one. Of small kinds there is also the base's own expectation, the mean of its next-token distributions over them,
from which bags are drawn: sixty questions in a language hold few of its words, what a language model expects there
holds nearly all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.model.experts.relevance import table_evidence

STEPS = 800
BATCH = 128
"""Positive and negative examples of a step, as many of each."""

RATE = 0.1
LENGTHS = (4, 96)
"""Tokens of an example, drawn with even odds for every order of magnitude."""

PRIOR = -3.0
"""Log-odds before any evidence: at a threshold of 0, three nats are needed to outweigh it."""

GROUP_RATE = 0.05
GROUP_FLOOR = 0.5
"""Share of the negative examples that is drawn evenly over the kinds, whatever their losses."""

MAX_EVIDENCE = 4.0
"""Most that one token may say, in nats, so that no single word admits an expert."""

FEWEST_EVIDENCE = 5.0
"""Threshold below which none is set, in nats."""

CHATS_ADMITTED = 0.002
"""Share of the held-out conversations that a threshold lets pass."""

PIECE = 32
"""Tokens of the pieces by which recall is measured."""


@dataclass(frozen=True)
class TokenGroup:
    """Public text of one kind.

    Attributes:
        name: of the kind.
        documents: token ids `[N]` of each document.
    """

    name: str
    documents: tuple[Tensor, ...]


@dataclass(frozen=True)
class Background:
    """Everything that an expert's domain is told from.

    Attributes:
        groups: public text by kind.
        expected_GV: for further kinds, the frequencies of tokens that the base expects, each row of sum 1.
        chats: conversations by which thresholds are set, none of them among `groups`: ids of what users say.
    """

    groups: tuple[TokenGroup, ...]
    expected_GV: Tensor
    chats: tuple[Tensor, ...]


@dataclass(frozen=True)
class RelevanceTable:
    """A table and its errors on text that it was not fitted to.

    Attributes:
        table_V: log-odds of each token.
        threshold: evidence above which a text counts as relevant.
        admitted_chats: share of held-out conversations above it.
        admitted_own: share of pieces of `PIECE` tokens of held-out own text above it.
    """

    table_V: Tensor
    threshold: float
    admitted_chats: float
    admitted_own: float

    def figures(self) -> dict[str, float]:
        """Return everything but the table, named as in `packs.manifest.GateSettings`."""
        return {
            "relevance_threshold": self.threshold,
            "admitted_chats": self.admitted_chats,
            "admitted_own": self.admitted_own,
        }


def fit_relevance(
    own_N: Tensor, held_out_N: Tensor, background: Background, vocabulary: int, seed: int = 0
) -> RelevanceTable:
    """Return the table of a domain.

    Args:
        own_N: tokens of the domain `[N]`, the more the better; a few thousand are enough.
        held_out_N: tokens of the same domain that are not among them.
        background: what the domain is told from.
        vocabulary: number of different tokens V.
        seed: of the sampling.
    """
    table_V = _fit(own_N, background, vocabulary, seed).clamp(-MAX_EVIDENCE, MAX_EVIDENCE).half().float()
    chats = torch.tensor([table_evidence(table_V, ids_N) for ids_N in background.chats])
    threshold = max(FEWEST_EVIDENCE, float(torch.quantile(chats, 1.0 - CHATS_ADMITTED)))
    pieces = held_out_N[: len(held_out_N) // PIECE * PIECE].view(-1, PIECE)
    own = torch.tensor([table_evidence(table_V, piece) for piece in pieces])
    return RelevanceTable(
        table_V, threshold, float((chats > threshold).float().mean()), float((own > threshold).float().mean())
    )


def _fit(own_N: Tensor, background: Background, vocabulary: int, seed: int) -> Tensor:
    """Return the weights of the logistic regression, by Adagrad (Duchi et al., 2011) from zero."""
    generator = torch.Generator().manual_seed(seed)
    own = _Pieces((own_N,))
    kinds: list[_Pieces | _Bags] = [_Pieces(group.documents) for group in background.groups]
    kinds += [_Bags(row_V) for row_V in background.expected_GV]
    table_V = torch.zeros(vocabulary)
    squares_V = torch.full((vocabulary,), 1e-8)
    hardness_K = torch.zeros(len(kinds))
    for _ in range(STEPS):
        share_K = GROUP_FLOOR / len(kinds) + (1.0 - GROUP_FLOOR) * hardness_K.softmax(0)
        drawn_K = torch.multinomial(share_K, BATCH, replacement=True, generator=generator).bincount(
            minlength=len(kinds)
        )
        examples = [own.draw(BATCH, generator)]
        examples += [kind.draw(count, generator) for kind, count in zip(kinds, drawn_K.tolist(), strict=True) if count]
        ids_N = torch.cat([ids for ids, _ in examples])
        lengths_E = torch.cat([lengths for _, lengths in examples])
        example_N = torch.repeat_interleave(torch.arange(len(lengths_E)), lengths_E)
        logits_E = torch.zeros(len(lengths_E)).index_add(0, example_N, table_V[ids_N]) + PRIOR
        is_own_E = torch.arange(len(lengths_E)) < BATCH
        error_E = (logits_E.sigmoid() - is_own_E.float()) / BATCH
        gradient_V = torch.zeros(vocabulary).index_add(0, ids_N, error_E[example_N])
        squares_V += gradient_V.square()
        table_V -= RATE * gradient_V / squares_V.sqrt()
        losses = torch.nn.functional.softplus(logits_E[BATCH:]).split(drawn_K[drawn_K > 0].tolist())
        hardness_K[drawn_K > 0] += GROUP_RATE * torch.stack([loss.mean() for loss in losses])
    return table_V


class _Pieces:
    """Documents out of which pieces of random length are cut; longer documents give more of them."""

    def __init__(self, documents: Sequence[Tensor]) -> None:
        self.ids_N = torch.cat([*documents]).long()
        self.lengths_D = torch.tensor([len(document) for document in documents])
        self.starts_D = self.lengths_D.cumsum(0) - self.lengths_D
        self.weights_D = self.lengths_D.float()

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the ids of `count` pieces, one after another, and their lengths."""
        document_E = torch.multinomial(self.weights_D, count, replacement=True, generator=generator)
        lengths_E = torch.minimum(_lengths(count, generator), self.lengths_D[document_E])
        slack_E = self.lengths_D[document_E] - lengths_E + 1
        starts_E = self.starts_D[document_E] + (torch.rand(count, generator=generator) * slack_E).long()
        before_E = lengths_E.cumsum(0) - lengths_E
        places_N = torch.arange(int(lengths_E.sum())) + torch.repeat_interleave(starts_E - before_E, lengths_E)
        return self.ids_N[places_N], lengths_E


class _Bags:
    """Bags of tokens drawn independently with given frequencies."""

    def __init__(self, frequency_V: Tensor) -> None:
        self.cumulative_V = frequency_V.double().cumsum(0)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the ids of `count` bags, one after another, and their sizes."""
        lengths_E = _lengths(count, generator)
        draws_N = torch.rand(int(lengths_E.sum()), generator=generator, dtype=torch.float64) * self.cumulative_V[-1]
        ids_N = torch.searchsorted(self.cumulative_V, draws_N).clamp(max=len(self.cumulative_V) - 1)
        return ids_N, lengths_E


def _lengths(count: int, generator: torch.Generator) -> Tensor:
    """Return `count` lengths between `LENGTHS`, even on a logarithmic scale."""
    shortest, longest = LENGTHS
    return (shortest * (longest / shortest) ** torch.rand(count, generator=generator)).long()
