"""Metrics of a run: one JSON object a line, the same figures for TensorBoard, and the loss curve as
a picture.
"""

import json
import resource
import sys
from pathlib import Path

from deepseek.checkpoint.store import atomic_write


class MetricsLog:
    """Appends records to `metrics.jsonl` in a run folder.

    A resumed run cuts what lies after its checkpoint, so that the file never tells a step twice.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Keep the records of steps before `first_step` and open the file for more."""
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # slow to load, and readers of a log need not

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(self.path) if record["step"] < first_step]
        with atomic_write(self.path) as temporary:
            temporary.write_text(
                "".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8"
            )
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=first_step
        )  # hides later steps

    def write(self, step: int, **values: float) -> None:
        """Append one record."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the whole records of a metrics file; a line that a crash cut off is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def plot_losses(folder: Path) -> Path:
    """Draw `metrics.jsonl` of a run folder as `loss.png` beside it: training and held-out loss, the
    best one marked.
    """
    from matplotlib.figure import Figure

    records = read_metrics(folder / "metrics.jsonl")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=folder.name)
    for name, style in (("loss", "-"), ("held_out_loss", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                style,
                label=name.replace("_", " "),
                markersize=4,
                linewidth=1,
            )
            if name == "held_out_loss" and len(points) > 2:
                step, lowest = min(points, key=lambda point: point[1])
                axes.plot(
                    step,
                    lowest,
                    "*",
                    label=f"best, after step {step:,}",
                    markersize=12,
                    color="tab:green",
                )
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    path = folder / "loss.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def peak_memory() -> int:
    """Return the largest resident size so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes elsewhere
