"""The progress of one training, as the server reports it."""

import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from deepseek.checkpoint.store import home, read_object
from deepseek.errors import CheckpointError
from deepseek.packs.manifest import Metric
from deepseek.server.errors import without_paths
from deepseek.train.loop.metrics import read_metrics

State = Literal["running", "stopped", "failed", "plugged"]

LINE = re.compile(r"(?P<stage>[^:]{1,60}): (?P<done>\d+)(?:/(?P<total>\d+))?\b")
"""Format of the lines that `ProgressBar` writes without a terminal."""

SAYS = ("scoring the base", "calibrating the gates")
"""Lines without a count that announce a stage."""

POINTS = 300
"""Maximum number of points of a loss curve; a longer curve is thinned out."""


@dataclass
class Lesson:
    """The progress of one training.

    Attributes:
        name: name of the expert.
        state: "running", "stopped", "failed", or "plugged" after a success.
        stage: name of the current stage.
        done: units of work done in this stage.
        total: units of work of this stage; 0: unknown.
        message: last line of the training's output, or after a failure its reason.
        losses: training loss as (step, nats per token).
        held_out: held-out loss as (step, nats per token).
        verdict: once plugged, whether the expert is better or worse than the base, and by how much.
        armed: whether the expert is armed by default. One that is no better than the base is armed
            only in requests that name it.
        before, after: loss on the held-out set without and with the expert, in nats per token; None
            until both are measured.
        gain: relative reduction of that loss, negative for a worse expert; None likewise.
        story: once trained, what limited the result, in words.
        seconds: time since the start; after the end, the duration.
        expected_seconds: the planned duration of training and preparation; None: not planned yet.
    """

    name: str
    state: State = "running"
    stage: str = "starting"
    done: int = 0
    total: int = 0
    message: str = ""
    losses: list[tuple[float, float]] = field(default_factory=list)
    held_out: list[tuple[float, float]] = field(default_factory=list)
    verdict: str = ""
    armed: bool = False
    before: float | None = None
    after: float | None = None
    gain: float | None = None
    story: str = ""
    seconds: float = 0.0
    expected_seconds: float | None = None

    def __post_init__(self) -> None:
        self._started = time.monotonic()

    def read(self, line: str) -> None:
        """Update the progress from a line of the training's output."""
        self.message = without_paths(line)
        match = LINE.match(line)
        if match:
            self.stage = match["stage"]
            self.done = int(match["done"])
            self.total = int(match["total"] or 0)
        elif line in SAYS:
            self.begin(line)

    def begin(self, stage: str) -> None:
        """Begin a stage of unknown length."""
        self.stage = stage
        self.done = self.total = 0

    def finish(self, state: State) -> None:
        """End in a state, unless it has ended already."""
        if self.state == "running":
            self.seconds = self._elapsed()
            self.state = state

    def look(self) -> None:
        """Update clock, plan and loss curves from the run folder."""
        folder = home() / "runs" / self.name
        records = read_metrics(folder / "training" / "metrics.jsonl")
        losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
        self.losses = losses[:: -(-len(losses) // POINTS) or 1]
        self.held_out = [
            (record["step"], record["held_out_loss"])
            for record in records
            if "held_out_loss" in record
        ]
        if self.state == "running":
            self.seconds = self._elapsed()
        if self.expected_seconds is None and (folder / "plan.json").is_file():
            self.expected_seconds = self.seconds + _planned_seconds(folder / "plan.json")

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._started, 1)

    def end(self) -> None:
        """Read the result of a finished training from its run folder.

        For an expert that was trained by an earlier version, parts of it may be missing.
        """
        try:
            result = read_object(home() / "runs" / self.name / "result.json")
            measured = Metric(before=result["before"], after=result["after"])
        except (CheckpointError, KeyError, ValueError):
            return
        self.before = measured.before
        self.after = measured.after
        self.gain = measured.gain
        self.story = str(result.get("story", ""))

    def fields(self) -> dict[str, Any]:
        """Return the progress as JSON fields."""
        return asdict(self)


def _planned_seconds(path: Path) -> float:
    """Return the duration of the training in a stored plan; 0 if it holds none."""
    try:
        return float(read_object(path)["plan"]["seconds"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return 0.0
