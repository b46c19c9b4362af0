"""A little public text in every step of an expert, so that what it learns is not paid for
elsewhere.

Training on its own text alone teaches an expert to be louder than it must be on everything else.
One part in five of each step is therefore public text (see `public.py`), half of it written by the
base itself: on that the loss is, up to a constant, the divergence of the expert from its base
(replay, arXiv:1811.11682). The gate keeps an expert silent where it does not belong; replay makes
it do little harm where the gate errs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek.data.text.document import Progress, silent
from deepseek.data.text.loader import Batch
from deepseek.model.transformer import DeepSeekModel
from deepseek.train.gates.public_text import public_batches, public_streams, training_rows

SHARE = 0.2
"""Part of the tokens of a step."""


@dataclass(frozen=True)
class Replay:
    """Public rows and their streams below an expert, a few of them for each step.

    Attributes:
        rows: all of them.
        stream_BTD: their frozen stream, one entry a row.
        per_step: rows a step.
    """

    rows: Batch
    stream_BTD: Tensor
    per_step: int

    @staticmethod
    def beside(
        model: DeepSeekModel,
        tokenizer: PreTrainedTokenizerFast,
        first: int,
        own_tokens: int,
        progress: Progress = silent,
    ) -> "Replay":
        """Return the replay of an expert whose first layer is `first` and whose steps have
        `own_tokens` of its own.
        """
        ids = training_rows(model, tokenizer, progress)
        stream_BTD = public_streams(model, tokenizer, first, progress)
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        (rows,) = public_batches(ids[order], len(ids))
        wanted = round(own_tokens * SHARE / (1.0 - SHARE) / ids.shape[1])
        return Replay(rows, stream_BTD[order], min(max(1, wanted), len(ids)))

    def at(self, step: int) -> tuple[Batch, Tensor]:
        """Return the rows of one step and their streams, a function of `step` alone."""
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
