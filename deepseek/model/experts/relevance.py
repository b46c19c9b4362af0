"""Whether a text is about an expert's domain at all: evidence token by token, before any gate is asked.

A gate reads hidden states. It recognises its domain after few tokens, and it also fires on kinds of text that its
public set lacks. Relevance is the opposite, evidence from the words alone: a table gives each token's log-odds for the
expert's domain against everything else. A word seen in neither says nothing, and so does text of an unknown kind. An
expert may contribute only where enough evidence has come together, as in a sequential probability ratio test (Wald,
1945); within that, its gates decide token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from deepseek.model.experts.module import ExpertModule
from deepseek.model.experts.scan import scan

HALF_LIFE = 64.0
"""Tokens after which evidence counts half, so that a text may change its subject."""

DECAY = 0.5 ** (1.0 / HALF_LIFE)


@dataclass(frozen=True)
class RelevanceBank:
    """The tables of all candidate modules.

    Attributes:
        table_MV: log-odds of each token of the vocabulary, zeros for modules that have no table.
        threshold_M: evidence above which a module is admitted; minus infinity for modules without a table. It contains
            log M, the price of asking M modules: the odds that one of them is relevant are shared among them.
    """

    table_MV: Tensor
    threshold_M: Tensor

    @staticmethod
    def stack(modules: Sequence[ExpertModule], device: torch.device) -> "RelevanceBank | None":
        """Return the bank of `modules` in their order, or None if not one of them has a table."""
        sizes = [len(module.relevance) for module in modules if module.relevance is not None]
        if not sizes:
            return None
        tables = []
        thresholds = []
        for module in modules:
            known = module.relevance is not None
            tables.append(module.relevance.float() if module.relevance is not None else torch.zeros(sizes[0]))
            thresholds.append(module.settings.relevance_threshold + log(len(modules)) if known else -torch.inf)
        return RelevanceBank(torch.stack(tables).to(device), torch.tensor(thresholds, device=device))

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
        """Return the evidence so far at every token, s_t = DECAY s_{t-1} + evidence_t, and that after the last one.

        Args:
            ids_BT: token ids `[B, T]`.
            state_BM: evidence before these tokens; None: none.
            counted_BT: False at padding, which neither counts nor ages what came before; None: all are real.
            document_ids_BT: of packed rows; a new document starts from nothing.

        Returns:
            Evidence `[B, T, M]` and `[B, M]`.
        """
        terms = self.evidence(ids_BT)[:, :, None]
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

    def decide(self, ids_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        """Return which modules `[B, M]` a text as a whole admits."""
        _, evidence_BM = self.accumulate(ids_BT, counted_BT=counted_BT)
        return evidence_BM > self.threshold_M


def table_evidence(table_V: Tensor, ids_N: Tensor) -> float:
    """Return the evidence of one table after the tokens `[N]` of a text."""
    ages_N = torch.arange(len(ids_N) - 1, -1, -1, dtype=torch.float64)
    return float((table_V[ids_N].double() * DECAY**ages_N).sum())
