"""Where a run of the loop stands: what decides how it goes on, beside weights, moments and the
place in the data.

Steps made outside the loop (`rlpo_update`) are guarded by the same rules.
"""

import math
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from deepseek.errors import TrainError

SPIKE_WINDOW = 64
"""Losses of past steps that a new one is compared with."""

SPIKE_SIGMAS = 6.0
"""Standard deviations above their mean at which a loss is a spike: its step is skipped."""

MAX_SPIKES_IN_A_ROW = 3
"""A loss that stays up is no spike but a new level, harder text for one, and is then learned
from.
"""


MAX_SKIPPED_IN_A_ROW = 10
"""Non-finite steps in a row after which the run has diverged and going on is of no use."""


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: steps done.
        skipped: those among them that moved nothing, for non-finite values or a spike of the loss.
        skipped_in_a_row: latest steps skipped for non-finite values.
        spikes_in_a_row: latest steps skipped for a spike.
        tokens: targets seen.
        recent: latest losses, which tell a spike from the usual noise.
        evaluated: step of the latest evaluation; -1 before the first.
        best: lowest figure of all evaluations, if the run keeps its best state.
        best_step: steps done when it was measured.
        stale: evaluations since then.
        cooling: first and last step of the cool-down, once it has begun.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes_in_a_row: int = 0
    tokens: int = 0
    recent: list[float] = field(default_factory=list)
    evaluated: int = -1
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    cooling: list[int] = field(default_factory=list)

    def takes(self, loss: float, grad_norm: float) -> bool:
        """Count a step; return whether to apply it: loss and gradient are finite, and the loss is
        no spike.
        """
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        taken = finite and not self.is_spike(loss)
        self.step += 1
        self.skipped += not taken
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        return taken

    def check_divergence(self, learning_rate: float) -> None:
        """Raise `TrainError` where nothing but non-finite values comes; `learning_rate` is named in
        the message.
        """
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainError(
                f"The last {MAX_SKIPPED_IN_A_ROW} steps had a loss or gradient that is not finite; start a new run "
                f"with a lower learning rate than {learning_rate}."
            )

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` lies far above the recent ones; a level that stays is accepted and the
        window begun anew.
        """
        spike = False
        if len(self.recent) == SPIKE_WINDOW:
            mean = fmean(self.recent)
            # Nearly constant losses have no noise to measure by: a hundredth of their size is the
            # least that counts.
            spike = loss > mean + SPIKE_SIGMAS * max(pstdev(self.recent), 0.01 * abs(mean))
        if spike and self.spikes_in_a_row == MAX_SPIKES_IN_A_ROW:
            self.recent.clear()
            spike = False
        self.spikes_in_a_row = self.spikes_in_a_row + 1 if spike else 0
        if not spike:
            self.recent = [*self.recent, loss][-SPIKE_WINDOW:]
        return spike

    def is_best(self, figure: float) -> bool:
        """Take in the figure of an evaluation at this step; return whether it is the lowest so far
        (NaN never is).
        """
        if self.best is None or figure < self.best:
            self.best = figure
            self.best_step = self.step
            self.stale = 0
            return True
        self.stale += 1
        return False
