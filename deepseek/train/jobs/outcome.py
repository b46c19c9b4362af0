"""What a training came to, in figures and in words."""

from dataclasses import dataclass

from deepseek.packs.manifest import Metric
from deepseek.train.loop.loop import TrainResult
from deepseek.train.loop.position import Position


@dataclass(frozen=True)
class Outcome:
    """The end of a run that kept its best state.

    Attributes:
        result: of the loop.
        reported: loss on text that had no part in the run, of the base and of the best state.
        story: what happened, in words.
    """

    result: TrainResult
    reported: Metric
    story: str

    def __str__(self) -> str:
        reported = self.reported
        return f"{reported.verdict}: held-out loss {reported.before:.4f} -> {reported.after:.4f}; {self.story}"


def tell(position: Position, steps: int, steps_a_pass: float, limit: str) -> str:
    """Return what happened in a run, and what would help it.

    Args:
        position: where it ended.
        steps: that were planned.
        steps_a_pass: steps that one pass over the text takes.
        limit: what ended the plan: the "text", the "time", or the "tokens" asked for.
    """
    if position.best_step == 0:
        return "no gain: the base knows this text already, or there is too little of it"
    passes = f"{position.best_step / steps_a_pass:.1f} of {steps / steps_a_pass:.1f} passes"
    if position.cooling:
        back = position.cooling[0] / steps_a_pass
        return f"best after {passes}, held-out loss had stopped falling by {back:.1f}; {MORE_TEXT}"
    if position.best_step < position.step:
        return f"best after {passes}; {MORE_TEXT}"
    if limit == "text":
        return f"best at the end of {steps / steps_a_pass:.1f} passes; {MORE_TEXT}"
    return f"still falling at the end of {steps / steps_a_pass:.1f} passes; more {MORE[limit]} would help"


MORE_TEXT = "more text would help more than more time"
MORE = {"time": "minutes", "tokens": "tokens"}
