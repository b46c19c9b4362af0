"""Whether a text is about an expert's domain at all: evidence token by token, before any gate is
asked.

A gate reads hidden states. It recognises its domain after few tokens, and it also fires on kinds of
text that its public set lacks. Relevance is the opposite, evidence from the words alone: a table
gives each token's log-odds for the expert's domain against everything else
(`train/gates/relevance.py`), and words of an unknown kind are never evidence for it.

A conversation must ask for an expert: what its user says, as a whole, must give more evidence than
a threshold. In a document, the evidence of what has been read is added to the gates' scores, token
by token (`experts/gate.py`). Evidence adds up as in a sequential probability ratio test (Wald,
1945), with a half-life, so that a text may change its subject.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepseek.model.experts.gate import NATS
from deepseek.model.experts.scan import scan

if TYPE_CHECKING:
    from deepseek.model.experts.module import ExpertModule

HALF_LIFE = 64.0
"""Tokens after which evidence counts half."""

DECAY = 0.5 ** (1.0 / HALF_LIFE)

RULED_OUT = -NATS
"""Evidence of a prompt, offset included, below which an expert takes no part in what follows it, in
nats.
"""


@dataclass(frozen=True)
class Relevance:
    """What the words of a text say about one expert's domain.

    Attributes:
        table_V: evidence of each token of the vocabulary, in nats.
        threshold: evidence that a conversation must give where this is the only candidate, in nats.
        offset: what each token of a document adds, so that own text has evidence above 0 and other
            text below, in nats.
    """

    table_V: Tensor
    threshold: float
    offset: float

    def keeps(self, ids_N: Tensor) -> bool:
        """Return whether a document that begins with the tokens `[N]` does not rule the expert
        out.
        """
        shifted = Relevance(self.table_V + self.offset, self.threshold, 0.0)
        return text_evidence(shifted, ids_N) > RULED_OUT


@dataclass(frozen=True)
class RelevanceBank:
    """The relevance of all candidate modules.

    Attributes:
        table_MV: zeros for modules that have no table.
        threshold_M: evidence above which a conversation admits a module; minus infinity for modules
            without a table. It contains log M, the price of asking M modules: the odds that one of
            them is relevant are shared among them.
        offset_M: 0 for modules without a table, of which no document says anything.
    """

    table_MV: Tensor
    threshold_M: Tensor
    offset_M: Tensor

    @staticmethod
    def stack(modules: "Sequence[ExpertModule]", device: torch.device) -> "RelevanceBank | None":
        """Return the bank of `modules` in their order, or None if not one of them has a table."""
        known = [module.relevance for module in modules]
        size = max((len(one.table_V) for one in known if one is not None), default=0)
        if size == 0:
            return None
        tables = [torch.zeros(size) if one is None else one.table_V.float() for one in known]
        thresholds = [
            -torch.inf if one is None else one.threshold + log(len(modules)) for one in known
        ]
        offsets = [0.0 if one is None else one.offset for one in known]
        return RelevanceBank(
            torch.stack(tables).to(device),
            torch.tensor(thresholds, device=device),
            torch.tensor(offsets, device=device),
        )

    def evidence(self, ids_BT: Tensor) -> Tensor:
        """Return each token's own evidence `[B, T, M]`; ids beyond the tables say nothing."""
        known_BT = ids_BT < self.table_MV.shape[1]
        evidence_BTM = self.table_MV[:, ids_BT.where(known_BT, 0)].permute(1, 2, 0)
        return evidence_BTM * known_BT[..., None]

    def accumulate(
        self,
        ids_BT: Tensor,
        state_BM: Tensor | None = None,
        counted_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the sums so far at every token, s_t = DECAY s_{t-1} + term_t, and those after the
        last one.

        Args:
            ids_BT: token ids `[B, T]`.
            state_BM: sums before these tokens `[B, M+1]`; None: none.
            counted_BT: False at padding, which neither counts nor ages what came before; None: all
                are real.
            document_ids_BT: of packed rows; a new document starts from nothing.

        Returns:
            Sums of evidence `[B, T, M+1]`, of which the last column counts the tokens, and
            `[B, M+1]`.
        """
        if ids_BT.shape[1] == 0:
            none_BM = (
                self.table_MV.new_zeros(len(ids_BT), len(self.table_MV) + 1)
                if state_BM is None
                else state_BM
            )
            return none_BM[:, None][:, :0], none_BM
        evidence_BTM = self.evidence(ids_BT)
        terms = torch.cat([evidence_BTM, torch.ones_like(evidence_BTM[..., :1])], dim=-1)[
            :, :, None
        ]
        keep = torch.full_like(terms, DECAY)
        if counted_BT is not None:
            counted = counted_BT[:, :, None, None]
            terms = terms.where(counted, 0.0)
            keep = keep.where(counted, 1.0)
        if document_ids_BT is not None:
            starts_BT = torch.diff(document_ids_BT, dim=1, prepend=document_ids_BT[:, :1]) != 0
            keep = keep.masked_fill(starts_BT[:, :, None, None], 0.0)
        if state_BM is not None:
            first = terms[:, :1] + keep[:, :1] * state_BM[:, None, None]
            terms = torch.cat([first, terms[:, 1:]], dim=1)
        sums_BTM = scan(keep, terms)[:, :, 0]
        return sums_BTM, sums_BTM[:, -1]

    def of_document(self, sums_BTM: Tensor) -> Tensor:
        """Return the evidence of a document for each module `[B, T, M]`, in nats, given its sums
        `[B, T, M+1]`.
        """
        return sums_BTM[..., :-1] + self.offset_M * sums_BTM[..., -1:]

    def above_threshold(self, ids_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        """Return by how much a conversation is above each module's threshold, in nats, `[B, M]`."""
        _, sums_BM = self.accumulate(ids_BT, counted_BT=counted_BT)
        return sums_BM[:, :-1] - self.threshold_M

    def document_keeps(self, ids_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        """Return which modules `[B, M]` a document as a whole does not rule out."""
        _, sums_BM = self.accumulate(ids_BT, counted_BT=counted_BT)
        return self.of_document(sums_BM) > RULED_OUT


def text_evidence(relevance: Relevance, ids_N: Tensor) -> float:
    """Return the evidence after the tokens `[N]` of a text, in nats."""
    ages_N = torch.arange(len(ids_N) - 1, -1, -1, dtype=torch.float64)
    return float((relevance.table_V[ids_N].double() * DECAY**ages_N).sum())
