"""Figures with their units."""

import math
from datetime import timedelta

BYTES = ("bytes", "memory", "size")
LOSSES = ("loss", "before", "after", "nats")
SHARES = ("share", "rate", "agreement", "accuracy", "recall")


def size(num_bytes: float) -> str:
    """Return a number of bytes in MB, or GB from a thousand on."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


LONGEST_CLOCK = 86400 * 10_000
"""Most seconds of a duration that is told to the second; longer ones are told in days."""


def duration(seconds: float) -> str:
    """Return a duration such as `3.2 s`, `4 min 30 s`, `2:03:04` or `1e+08 days`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    if seconds > LONGEST_CLOCK:
        return f"{seconds / 86400:.3g} days"
    return str(timedelta(seconds=round(seconds)))


def with_unit(name: str, value: object) -> str:
    """Return a figure of a run with the unit that its name implies.

    Args:
        name: name of the figure in `result.json`, such as `peak_memory`.
        value: its value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    words = name.lower().split("_")
    if "seconds" in words:
        return duration(value)
    if words[-1] in BYTES:
        return size(value)
    if words[-1] in LOSSES:
        return f"{value:.4f} nats per token"
    if words[-1] in SHARES and "learning" not in words and 0 <= value <= 1:
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
