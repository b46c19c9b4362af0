"""Helpers of comparisons: find installed rivals, and draw bar charts."""

import sys
from importlib.util import find_spec
from pathlib import Path

from matplotlib.figure import Figure

OURS, THEIRS = "#3b6ea8", "#b9bec6"


def installed(module: str) -> Path | None:
    """Return the path of this Python if it has `module`; a rival runs it in another process."""
    return Path(sys.executable) if find_spec(module) else None


def draw(path: Path, panels: dict[str, dict[str, float]]) -> None:
    """Draw a panel of horizontal bars for each title; names that begin with "ours" are
    highlighted.
    """
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(5 * len(panels), 1 + 0.4 * most), layout="constrained")
    for axes, (title, bars) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        colours = [OURS if name.startswith("ours") else THEIRS for name in bars]
        shown = axes.barh(list(bars), list(bars.values()), color=colours)
        axes.bar_label(
            shown,
            [f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in bars.values()],
            padding=3,
        )
        axes.set(title=title, xlim=(0, 1.18 * max(bars.values())))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")
