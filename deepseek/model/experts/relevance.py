"""Relevance: decides from token ids alone whether a text is about an expert's domain.

A gate reads hidden states. It recognises its domain after a few tokens, but it also fires on kinds
of text that its public calibration set lacks. Relevance complements it: tables hold the log-odds of
tokens, and of pairs of neighbouring tokens, for the expert's domain against all other text
(`train/gates/relevance.py`), and unfamiliar text never counts as evidence for the domain.

In a conversation, an expert is admitted only if the tokens of the user's messages as a whole give
more evidence than a threshold, and their pairs do not rule it out. In a document, pairs give the
evidence: they hold the names of a code base, which tell it from others of the same language. It is
added to the gate scores token by token (`experts/gate.py`). Evidence accumulates as in a sequential
probability ratio test (Wald, 1945), but decays with a half-life, so that a text may change its
subject.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.model.experts.gate import NATS
from deepseek.model.experts.scan import scan
from deepseek.model.relevance_state import RelevanceState
from deepseek.packs.manifest import PAIR_SLOTS

if TYPE_CHECKING:
    from deepseek.model.experts.module import ExpertModule

HALF_LIFE = 64.0
"""Half-life of a conversation's evidence, in tokens."""
DECAY = 0.5 ** (1.0 / HALF_LIFE)

DOCUMENT_HALF_LIFE = 128.0
"""Half-life of a document's evidence, in tokens: a longer one tells near domains apart better, a
shorter one notices sooner that a document changes its subject.
"""
DOCUMENT_DECAY = 0.5 ** (1.0 / DOCUMENT_HALF_LIFE)

PASSAGE = 128
"""Tokens of the passages of public text that documents are compared with."""

NATS_PER_CANDIDATES = 8.0
"""Additional evidence, in nats at the end of a passage, that is required for e times as many
candidates. By Bayes' rule it would be 1 if pairs were independent; they are not.
"""

RULED_OUT = -NATS
"""Evidence in nats, offset included, at or below which a prompt rules out an expert."""

NO_TOKEN = -1
"""Stands for the missing token before the first one."""


def pair_slots(before: Tensor, ids: Tensor) -> Tensor:
    """Return the entry of each pair of neighbouring tokens in a table of pairs.

    Args:
        before: first tokens of the pairs, int64 of any shape, below 2^21.
        ids: second tokens, of the same shape.
    """
    return (before * 73_856_093 + ids * 19_349_663) % PAIR_SLOTS


def token_weights(length: int, decay: float) -> Tensor:
    """Return the weights of `length` tokens after the last one has been read, fp64 `[N]`."""
    ages_N = torch.arange(length - 1, -1, -1, dtype=torch.float64, device="cpu")
    weights_N: Tensor = decay**ages_N
    return weights_N


PASSAGE_WEIGHT = float(token_weights(PASSAGE, DOCUMENT_DECAY).sum())


def price_of(candidates: int) -> float:
    """Return the additional evidence per token, in nats, that a document must give when there are
    this many candidates.
    """
    return NATS_PER_CANDIDATES * log(candidates) / PASSAGE_WEIGHT


@dataclass(frozen=True)
class Relevance:
    """The relevance tables of one expert.

    Attributes:
        table_V: log-odds of each token of the vocabulary, in nats; in fp16 if it comes from a pack.
        threshold: evidence above which a conversation admits the expert if it is the only
            candidate, in nats.
        offset: evidence added per token of a document, so that text of the domain has evidence
            above 0 and other text below 0, in nats.
        pairs_S: log-odds of pairs of tokens, in nats, at their `pair_slots`; None, as in packs of
            earlier versions: tokens give the evidence of documents too.
    """

    table_V: Tensor
    threshold: float
    offset: float
    pairs_S: Tensor | None = None

    def keeps(self, ids_N: Tensor) -> bool:
        """Return whether a document that starts with the tokens `[N]` admits the expert."""
        weights_N = token_weights(len(ids_N), DOCUMENT_DECAY)
        evidence = (
            float((self.table_V[ids_N].double() * weights_N).sum())
            if self.pairs_S is None
            else self.of_pairs(ids_N)
        )
        return evidence + self.offset * float(weights_N.sum()) > RULED_OUT

    def copied(self) -> "Relevance":
        """Return a copy that shares no memory with these tables."""
        pairs_S = None if self.pairs_S is None else self.pairs_S.clone()
        return replace(self, table_V=self.table_V.clone(), pairs_S=pairs_S)

    def of_pairs(self, ids_N: Tensor) -> float:
        """Return the decayed evidence of the pairs in the tokens `[N]`, in nats, without offset."""
        assert self.pairs_S is not None
        found = self.pairs_S[pair_slots(ids_N[:-1], ids_N[1:])].double()
        return float((found * token_weights(len(ids_N), DOCUMENT_DECAY)[1:]).sum())


@dataclass(frozen=True)
class RelevanceBank:
    """The relevance tables of all candidate modules, evaluated together.

    Attributes:
        tables: log-odds `[V]` of tokens in nats of each module, shared with it; None for modules
            without a table. They are not copied side by side: a thousand of them take 0.1 GiB.
        pairs: log-odds `[PAIR_SLOTS]` of pairs in nats of each module; None for modules without a
            table of pairs.
        paired_M: which modules have a table of pairs.
        threshold_M: evidence above which a conversation admits a module; minus infinity for modules
            without a table. It includes log M to correct for testing M modules: the prior odds that
            one of them is relevant are shared among them.
        offset_M: evidence added per token of a document; 0 for modules without a table. It includes
            the correction for M modules for those with a table of pairs.
    """

    tables: tuple[Tensor | None, ...]
    pairs: tuple[Tensor | None, ...]
    paired_M: Tensor
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
        price = price_of(len(modules))
        offsets = [
            0.0 if entry is None else entry.offset - price * (entry.pairs_S is not None)
            for entry in entries
        ]
        pairs = [None if entry is None else entry.pairs_S for entry in entries]
        return RelevanceBank(
            tuple(None if entry is None else entry.table_V.to(device) for entry in entries),
            tuple(None if pairs_S is None else pairs_S.to(device) for pairs_S in pairs),
            torch.tensor([pairs_S is not None for pairs_S in pairs], device=device),
            torch.tensor(thresholds, device=device),
            torch.tensor(offsets, device=device),
        )

    @cached_property
    def longest(self) -> int:
        """Number of tokens in the longest table."""
        return max(len(table_V) for table_V in self.tables if table_V is not None)

    def evidence(self, ids_BT: Tensor) -> Tensor:
        """Return the evidence of each token `[B, T, M]`, in nats; 0 for ids beyond the tables."""
        known_BT = ids_BT < self.longest
        ids_BT = ids_BT.where(known_BT, 0)
        return _looked_up(self.tables, ids_BT, self.longest) * known_BT[..., None]

    def document_evidence(self, ids_BT: Tensor, before_BT: Tensor) -> Tensor:
        """Return the evidence of each token of a document, `[B, T, M]`, in nats.

        It is that of the pair which the token ends; for a module without a table of pairs, that of
        the token itself.

        Args:
            ids_BT: token ids `[B, T]`.
            before_BT: the token before each, `NO_TOKEN` where there is none.
        """
        linked_BT = before_BT != NO_TOKEN
        slots_BT = pair_slots(before_BT.where(linked_BT, 0), ids_BT)
        of_pairs_BTM = _looked_up(self.pairs, slots_BT, PAIR_SLOTS) * linked_BT[..., None]
        if all(pairs_S is not None for pairs_S in self.pairs):
            return of_pairs_BTM
        return of_pairs_BTM.where(self.paired_M, self.evidence(ids_BT))

    def accumulate(
        self,
        ids_BT: Tensor,
        state: RelevanceState | None = None,
        counted_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> tuple[Tensor, RelevanceState]:
        """Return the decayed running sums of a document's evidence,
        s_t = DOCUMENT_DECAY s_{t-1} + term_t.

        Args:
            ids_BT: token ids `[B, T]`.
            state: state after the preceding tokens; None: no preceding tokens.
            counted_BT: False at padding, which neither counts nor decays the sums; None: no
                padding.
            document_ids_BT: document of each token in packed rows; a new document resets the sums.
                None: one document per row.

        Returns:
            The sums `[B, T, M+1]` at every token, and the state after the last one. The last column
            is the decayed count of tokens.
        """
        batch, length = ids_BT.shape
        if state is None:
            sums_BM = self.offset_M.new_zeros(batch, len(self.tables) + 1)
            state = RelevanceState(sums_BM, ids_BT.new_full((batch,), NO_TOKEN))
        if length == 0:
            return state.sums_BM[:, None][:, :0], state
        read_BT = ids_BT if counted_BT is None else ids_BT.where(counted_BT, NO_TOKEN)
        before_BT = torch.cat([state.last_B[:, None], read_BT[:, :-1]], dim=1)
        keep = self.offset_M.new_full((batch, length, 1, 1), DOCUMENT_DECAY)
        if document_ids_BT is not None:
            starts_BT = torch.diff(document_ids_BT, dim=1, prepend=document_ids_BT[:, :1]) != 0
            before_BT = before_BT.where(~starts_BT, NO_TOKEN)
            keep = keep.masked_fill(starts_BT[:, :, None, None], 0.0)
        sums_BTM = _summed(
            self.document_evidence(ids_BT, before_BT), keep, counted_BT, state.sums_BM
        )
        return sums_BTM, RelevanceState(sums_BTM[:, -1], read_BT[:, -1])

    def of_document(self, sums_BTM: Tensor) -> Tensor:
        """Return a document's evidence for each module `[B, T, M]`, in nats, offset included.

        Args:
            sums_BTM: sums `[B, T, M+1]` from `accumulate`; `[B, M+1]` works as well.
        """
        return sums_BTM[..., :-1] + self.offset_M * sums_BTM[..., -1:]

    def above_threshold(self, ids_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        """Return by how much a conversation is above each module's threshold `[B, M]`, in nats.

        It is also below if its pairs would rule the module out in a document, as in a question
        about code of another project.
        """
        sums_BM = _final_sums(self.evidence(ids_BT), DECAY, counted_BT)
        above_BM = sums_BM[:, :-1] - self.threshold_M
        if ids_BT.shape[1] == 0:
            return above_BM
        kept_BM = self.whole_document(ids_BT, counted_BT) - RULED_OUT
        return above_BM.where(~self.paired_M, torch.minimum(above_BM, kept_BM))

    def document_keeps(self, ids_BT: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return which modules `[B, M]` a document as a whole admits.

        Args:
            ids_BT: tokens of the document, on any device.
            attention_mask: 0 at padding, for these tokens and perhaps others before them; None: no
                padding.
        """
        device = self.offset_M.device
        counted_BT = None
        if attention_mask is not None:
            counted_BT = attention_mask[:, -ids_BT.shape[1] :].bool().to(device)
        return self.whole_document(ids_BT.to(device), counted_BT) > RULED_OUT

    def whole_document(self, ids_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        """Return a document's evidence for each module `[B, M]`, in nats, offset included.

        It equals that of the last sums of `accumulate`, without computing those before.
        """
        read_BT = ids_BT if counted_BT is None else ids_BT.where(counted_BT, NO_TOKEN)
        before_BT = F.pad(read_BT[:, :-1], (1, 0), value=NO_TOKEN)
        found_BTM = self.document_evidence(ids_BT, before_BT)
        return self.of_document(_final_sums(found_BTM, DOCUMENT_DECAY, counted_BT))


def _looked_up(tables: Sequence[Tensor | None], entries_BT: Tensor, longest: int) -> Tensor:
    """Return the values of tables at `entries_BT`, `[B, T, M]` in fp32; 0 where there is none.

    Args:
        tables: one per module; None for a module without a table.
        entries_BT: indices into the longest of them; a shorter one is 0 beyond its end.
        longest: number of entries of the longest table.
    """
    entries_N = entries_BT.flatten()
    values_MN = torch.zeros(len(tables), len(entries_N), device=entries_BT.device)
    for values_N, table in zip(values_MN, tables, strict=True):
        if table is None:
            continue
        # Copied, not stacked: autocast in bf16 refuses to stack fp16.
        if len(table) == longest:
            values_N.copy_(table.index_select(0, entries_N))
        else:
            inside_N = entries_N < len(table)
            values_N[inside_N] = table[entries_N[inside_N]].to(values_N.dtype)
    return values_MN.T.reshape(*entries_BT.shape, len(tables))


def _final_sums(evidence_BTM: Tensor, decay: float, counted_BT: Tensor | None) -> Tensor:
    """Return the decayed sums of evidence and of the number of tokens at the end, `[B, M+1]`.

    Args:
        evidence_BTM: evidence of each token.
        decay: factor on the sums at each token.
        counted_BT: False at padding; None: no padding.
    """
    if counted_BT is None:
        counted_BT = evidence_BTM.new_ones(evidence_BTM.shape[:2], dtype=torch.bool)
    ages_BT = counted_BT.flip(1).cumsum(1).flip(1) - 1
    weights_BT = decay**ages_BT * counted_BT
    # No matrix product: autocast would compute it in bf16.
    sums_BM = (weights_BT[..., None] * evidence_BTM).sum(1)
    return torch.cat([sums_BM, weights_BT.sum(1, keepdim=True)], dim=1)


def _summed(
    evidence_BTM: Tensor, keep: Tensor, counted_BT: Tensor | None, before_BM: Tensor | None = None
) -> Tensor:
    """Return decayed running sums of evidence and of the number of tokens, `[B, T, M+1]`.

    Args:
        evidence_BTM: evidence of each token.
        keep: factor on the sums at each token, `[B, T, 1, 1]`.
        counted_BT: False at padding; None: no padding.
        before_BM: sums `[B, M+1]` of the tokens before; None: there are none.
    """
    terms = torch.cat([evidence_BTM, torch.ones_like(evidence_BTM[..., :1])], dim=-1)[:, :, None]
    keep = keep.expand_as(terms)
    if counted_BT is not None:
        counted = counted_BT[:, :, None, None]
        terms = terms.where(counted, 0.0)
        keep = keep.where(counted, 1.0)
    if before_BM is not None:
        first = terms[:, :1] + keep[:, :1] * before_BM[:, None, None]
        terms = torch.cat([first, terms[:, 1:]], dim=1)
    return scan(keep, terms)[:, :, 0]


def text_evidence(relevance: Relevance, ids_N: Tensor) -> float:
    """Return the decayed evidence after the tokens `[N]` of a text, in nats, without offset."""
    found = relevance.table_V[ids_N].double()
    return float((found * token_weights(len(ids_N), DECAY)).sum())
