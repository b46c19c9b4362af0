"""The loss curve of a run as a picture."""

from pathlib import Path

from deepseek.checkpoint.store import atomic_write
from deepseek.train.metrics import read_metrics


def plot_losses(folder: Path) -> Path:
    """Draw `metrics.jsonl` of a run folder as `loss.png` beside it: training loss and held-out loss over steps."""
    from matplotlib.figure import Figure

    records = read_metrics(folder / "metrics.jsonl")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=folder.name)
    for name, style in (("loss", "-"), ("held_out_loss", "o-")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), markersize=4, linewidth=1)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    path = folder / "loss.png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
