"""Result of a training, in figures and in words."""

from dataclasses import dataclass

from deepseek.packs.manifest import Metric
from deepseek.train.loop.loop import TrainResult
from deepseek.train.loop.position import Position


@dataclass(frozen=True)
class Outcome:
    """Result of a run that ended at its best state.

    Attributes:
        result: result of the loop.
        reported: held-out loss of the base and of the best state, on text without influence on the
            run.
        story: summary in words.
    """

    result: TrainResult
    reported: Metric
    story: str

    def __str__(self) -> str:
        reported = self.reported
        return (
            f"{reported.verdict}: held-out loss {reported.before:.4f} -> {reported.after:.4f}; "
            f"{self.story}"
        )


def tell(position: Position, steps: int, steps_a_pass: float, limit: str) -> str:
    """Return a summary of a run, and what would improve its result.

    Args:
        position: final position of the loop.
        steps: number of planned steps.
        steps_a_pass: steps per pass over the text.
        limit: what bounded the plan: the "text", the "time", or the requested "tokens".
    """
    if position.best_step == 0:
        return NO_GAIN
    passes = f"{position.best_step / steps_a_pass:.1f} of {steps / steps_a_pass:.1f} passes"
    if position.cooling:
        stalled_passes = position.cooling[0] / steps_a_pass
        stalled = f"held-out loss had stopped falling by {stalled_passes:.1f}"
        return f"best after {passes}, {stalled}; {MORE_TEXT}"
    if position.best_step < position.step:
        return f"best after {passes}; {MORE_TEXT}"
    if limit == "text":
        return f"best at the end of {steps / steps_a_pass:.1f} passes; {MORE_TEXT}"
    all_passes = f"{steps / steps_a_pass:.1f} passes"
    return f"still falling at the end of {all_passes}; more {MORE[limit]} would help"


NO_GAIN = (
    "no gain: the base knows this text already, there is too little of it, or the learning rate is "
    "too high for this base"
)
MORE_TEXT = "more text would help more than more time"
MORE = {"time": "minutes", "tokens": "tokens", "text": "text"}
