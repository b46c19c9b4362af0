"""Position of a run, and the guards against spikes and divergence.

With weights, moments and the position in the data, it determines how a run continues.
`rlpo_update`, which steps outside the loop, uses the same guards.
"""

import math
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from deepseek.errors import TrainError

SPIKE_WINDOW = 64
"""Number of past losses that a new one is compared with."""

SPIKE_SIGMAS = 6.0
"""Standard deviations above the mean at which a loss is a spike, whose step is skipped."""

MAX_SPIKES_IN_A_ROW = 3
"""Maximum spikes to skip in a row. A loss that stays high is a new level, for example of harder
text, and is trained on.
"""


MAX_SKIPPED_IN_A_ROW = 10
"""Consecutive non-finite steps after which a run counts as diverged."""


@dataclass
class Position:
    """Position of a run.

    Attributes:
        step: finished steps, including skipped ones.
        skipped: steps that were not applied because of non-finite values or a spike of the loss.
        skipped_in_a_row: latest consecutive steps skipped for non-finite values.
        spikes_in_a_row: latest consecutive steps skipped for a spike.
        tokens: targets trained on.
        recent: latest losses, to detect spikes.
        evaluated: step of the latest evaluation; -1 before the first.
        best: lowest figure of all evaluations, if the run keeps its best state.
        best_step: step of that evaluation.
        stale: number of evaluations since then.
        cooling: first and last step of the cool-down; empty before it.
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
        """Count a step; return whether to apply it.

        A step is skipped if its loss or gradient is not finite, or its loss is a spike.
        """
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        applied = finite and not self.is_spike(loss)
        self.step += 1
        self.skipped += not applied
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        return applied

    def check_divergence(self, learning_rate: float) -> None:
        """Raise `TrainError` after too many non-finite steps in a row; it names `learning_rate`."""
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainError(
                f"The last {MAX_SKIPPED_IN_A_ROW} steps had a loss or gradient that is not finite; "
                f"start a new run with a lower learning rate than {learning_rate}."
            )

    def is_spike(self, loss: float) -> bool:
        """Return whether `loss` is far above the recent ones; accept a level that persists."""
        spike = False
        if len(self.recent) == SPIKE_WINDOW:
            mean = fmean(self.recent)
            # Nearly constant losses have almost no deviation; assume at least 1 % of their size.
            spike = loss > mean + SPIKE_SIGMAS * max(pstdev(self.recent), 0.01 * abs(mean))
        if spike and self.spikes_in_a_row == MAX_SPIKES_IN_A_ROW:
            self.recent.clear()
            spike = False
        self.spikes_in_a_row = self.spikes_in_a_row + 1 if spike else 0
        if not spike:
            self.recent = [*self.recent, loss][-SPIKE_WINDOW:]
        return spike

    def is_best(self, figure: float) -> bool:
        """Record the figure of an evaluation; return whether it is the lowest so far; one that is
        not finite never is.
        """
        if math.isfinite(figure) and (self.best is None or figure < self.best):
            self.best = figure
            self.best_step = self.step
            self.stale = 0
            return True
        self.stale += 1
        return False
