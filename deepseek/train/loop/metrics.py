"""Metrics of a run as JSON lines and for TensorBoard, and a plot of the loss."""

import json
from pathlib import Path

from deepseek.checkpoint.store import atomic_write


class MetricsLog:
    """Writer of `metrics.jsonl` in a run folder.

    A resumed run first drops the records after its checkpoint, so that no step appears twice.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open the log, keeping the records of steps before `first_step`."""
        # Slow to import, and only writers need it.
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        earlier_records = [
            record for record in read_metrics(self.path) if record["step"] < first_step
        ]
        with atomic_write(self.path) as temporary:
            temporary.write_text(
                "".join(json.dumps(record) + "\n" for record in earlier_records), encoding="utf-8"
            )
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        # `purge_step` hides the records after the checkpoint.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

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
    """Return the complete records of a metrics file, up to a line truncated by a crash."""
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
    """Plot training and held-out loss of a run folder to `loss.png`, with the best state marked."""
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
