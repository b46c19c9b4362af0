"""Relevance: decides from token ids alone whether a text is about an expert's domain.

A gate reads hidden states. It recognises its domain after a few tokens, but it also fires on kinds
of text that its public calibration set lacks. Relevance complements it: a table holds each token's
log-odds for the expert's domain against all other text (`train/gates/relevance.py`), and unfamiliar
tokens never count as evidence for the domain.

In a conversation, an expert is admitted only if the user's messages as a whole give more evidence
than a threshold. In a document, the evidence so far is added to the gate scores token by token
(`experts/gate.py`). Evidence accumulates as in a sequential probability ratio test (Wald, 1945),
but decays with a half-life, so that a text may change its subject.
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
"""Half-life of evidence, in tokens."""

DECAY = 0.5 ** (1.0 / HALF_LIFE)

RULED_OUT = -NATS
"""Evidence in nats, offset included, at or below which a prompt rules out an expert."""


@dataclass(frozen=True)
class Relevance:
    """The relevance table of one expert.

    Attributes:
        table_V: log-odds of each token of the vocabulary, in nats; in fp16 if it comes from a pack.
        threshold: evidence above which a conversation admits the expert if it is the only
            candidate, in nats.
        offset: evidence added per token of a document, so that text of the domain has evidence
            above 0 and other text below 0, in nats.
    """

    table_V: Tensor
    threshold: float
    offset: float

    def keeps(self, ids_N: Tensor) -> bool:
        """Return whether a document that starts with the tokens `[N]` admits the expert."""
        shifted = Relevance(self.table_V.float() + self.offset, self.threshold, 0.0)
        return text_evidence(shifted, ids_N) > RULED_OUT


@dataclass(frozen=True)
class RelevanceBank:
    """The relevance tables of all candidate modules, evaluated together.

    Attributes:
        tables: log-odds `[V]` in nats of each module, shared with it; None for modules without a
            table. They are not copied side by side: a thousand of them take 0.1 GiB.
        threshold_M: evidence above which a conversation admits a module; minus infinity for modules
            without a table. It includes log M to correct for testing M modules: the prior odds that
            one of them is relevant are shared among them.
        offset_M: evidence added per token of a document; 0 for modules without a table.
    """

    tables: tuple[Tensor | None, ...]
    threshold_M: Tensor
    offset_M: Tensor

    @staticmethod
    def stack(modules: "Sequence[ExpertModule]", device: torch.device) -> "RelevanceBank | None":
        """Return the tables of `modules`, in their order, or None if no module has one."""
        entries = [module.relevance for module in modules]
        if all(entry is None for entry in entries):
            return None
        thresholds = [
            -torch.inf if entry is None else entry.threshold + log(len(modules))
            for entry in entries
        ]
        offsets = [0.0 if entry is None else entry.offset for entry in entries]
        return RelevanceBank(
            tuple(None if entry is None else entry.table_V.to(device) for entry in entries),
            torch.tensor(thresholds, device=device),
            torch.tensor(offsets, device=device),
        )

    def evidence(self, ids_BT: Tensor) -> Tensor:
        """Return the evidence of each token `[B, T, M]`, in nats; 0 for ids beyond the tables."""
        none_N = torch.zeros(ids_BT.numel(), device=ids_BT.device)
        size = max(len(table_V) for table_V in self.tables if table_V is not None)
        known_BT = ids_BT < size
        ids_N = ids_BT.where(known_BT, 0).flatten()
        parts = [none_N if table_V is None else table_V[ids_N].float() for table_V in self.tables]
        evidence_BTM = torch.stack(parts, -1).view(*ids_BT.shape, len(parts))
        return evidence_BTM * known_BT[..., None]

    def accumulate(
        self,
        ids_BT: Tensor,
        state_BM: Tensor | None = None,
        counted_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the decayed running sums of evidence, s_t = DECAY s_{t-1} + term_t.

        Args:
            ids_BT: token ids `[B, T]`.
            state_BM: sums of the preceding tokens `[B, M+1]`; None: no preceding tokens.
            counted_BT: False at padding, which neither counts nor decays the sums; None: no
                padding.
            document_ids_BT: document of each token in packed rows; a new document resets the sums.
                None: one document per row.

        Returns:
            The sums `[B, T, M+1]` at every token and `[B, M+1]` after the last one. The last column
            is the decayed count of tokens.
        """
        if ids_BT.shape[1] == 0:
            sums_BM = (
                self.offset_M.new_zeros(len(ids_BT), len(self.tables) + 1)
                if state_BM is None
                else state_BM
            )
            return sums_BM[:, None][:, :0], sums_BM
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
        """Return a document's evidence for each module `[B, T, M]`, in nats, offset included.

        Args:
            sums_BTM: sums `[B, T, M+1]` from `accumulate`; `[B, M+1]` works as well.
        """
        return sums_BTM[..., :-1] + self.offset_M * sums_BTM[..., -1:]

    def above_threshold(self, ids_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        """Return a conversation's evidence minus each module's threshold `[B, M]`, in nats."""
        _, sums_BM = self.accumulate(ids_BT, counted_BT=counted_BT)
        return sums_BM[:, :-1] - self.threshold_M

    def document_keeps(self, ids_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        """Return which modules `[B, M]` a document as a whole admits."""
        return self.document_evidence(ids_BT, counted_BT) > RULED_OUT

    def document_evidence(self, ids_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        """Return a document's evidence for each module `[B, M]`, in nats, offset included."""
        _, sums_BM = self.accumulate(ids_BT, counted_BT=counted_BT)
        return self.of_document(sums_BM)


def text_evidence(relevance: Relevance, ids_N: Tensor) -> float:
    """Return the decayed evidence after the tokens `[N]` of a text, in nats, without offset."""
    ages_N = torch.arange(len(ids_N) - 1, -1, -1, dtype=torch.float64)
    return float((relevance.table_V[ids_N].double() * DECAY**ages_N).sum())
