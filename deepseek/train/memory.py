"""How much memory this process has needed."""

import resource
import sys


def peak_memory() -> int:
    """Return the largest resident size so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes elsewhere
