"""Replay: public text in every training step of an expert, against forgetting.

An expert trained only on its own text deviates from the base more than necessary on other text.
Therefore a fifth of each step's tokens is public text (see `public_text.py`). Half of it is sampled
from the base; on this half the loss is, up to a constant, the KL divergence of the expert from its
base (replay, arXiv:1811.11682). The gate keeps an expert inactive outside its domain, and replay
limits the harm where the gate errs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek.data.text.document import Progress, silent
from deepseek.data.text.loader import Batch
from deepseek.model.language_model import LanguageModel
from deepseek.train.gates.public_text import public_batches, public_streams, training_rows

SHARE = 0.2
"""Share of replay in the tokens of a step."""


@dataclass(frozen=True)
class Replay:
    """Public rows and their residual streams below an expert, a few for each step.

    Attributes:
        rows: all public rows.
        stream_BTD: residual stream of each row, from the frozen trunk.
        per_step: rows per step.
    """

    rows: Batch
    stream_BTD: Tensor
    per_step: int

    @staticmethod
    def beside(
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerFast,
        first: int,
        own_tokens: int,
        progress: Progress = silent,
    ) -> "Replay":
        """Return the replay of an expert.

        Args:
            model: base model.
            tokenizer: tokenizer of the base.
            first: first layer of the expert.
            own_tokens: tokens per step of the expert's own text.
            progress: shows the progress.
        """
        ids = training_rows(model, tokenizer, progress)
        stream_BTD = public_streams(model, tokenizer, first, progress)
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        (rows,) = public_batches(ids[order], len(ids))
        return Replay.of(rows, stream_BTD[order], own_tokens)

    @staticmethod
    def of(rows: Batch, stream_BTD: Tensor, own_tokens: int) -> "Replay":
        """Return a replay of given rows, with as many per step as make up `SHARE` of its tokens."""
        count, length = rows.labels.shape
        wanted = round(own_tokens * SHARE / (1.0 - SHARE) / length)
        return Replay(rows, stream_BTD, min(max(1, wanted), count))

    def at(self, step: int) -> tuple[Batch, Tensor]:
        """Return the rows of one step and their residual streams, which depend on `step` alone."""
        chosen = torch.arange(step * self.per_step, (step + 1) * self.per_step) % len(
            self.rows.row_ids
        )
        rows = self.rows
        batch = Batch(
            rows.input_ids[chosen],
            rows.labels[chosen],
            rows.position_ids[chosen],
            rows.row_ids[chosen],
        )
        return batch, self.stream_BTD[chosen]
