"""Parts of a model's layers whose keys and values are cached separately, so that sequences with
different experts share those of the lower layers.

An expert at layer f changes the residual stream after layer f's attention. So keys and values up to
layer f, and the residual stream after that attention, do not depend on it. A model is divided at
such layers, the cuts; a sequence that takes a lower part from the cache resumes at its cut.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

CUTS = 3
"""Maximum number of cuts. Each cut stores the residual stream of every cached token, which takes
about a tenth of the memory of its keys and values.
"""
LEAST_SHARE = 0.25
"""Minimum share of the layers below a cut; sharing fewer does not pay for the cut's memory."""
DEFAULT_EXPERT_LAYERS = 3
"""By default, experts are in the last three layers. That cut always exists (above `LEAST_SHARE`),
so that a prompt cached before the first such expert was plugged can be reused with it.
"""


@dataclass(frozen=True)
class LayerPart:
    """Adjacent layers whose keys and values are cached together.

    Attributes:
        cached: the layers whose keys and values belong to the part.
        gated: the layers whose gates belong to the part; they start and end one layer earlier,
            because a cut runs through a layer, between its attention and its experts.
        cut: layer after whose attention the residual stream is stored with the part; None: the
            uppermost part, above which nothing is computed.
    """

    cached: range
    gated: range
    cut: int | None


def layer_parts(layers: int, cuts: Sequence[int]) -> tuple[LayerPart, ...]:
    """Return the parts of a model from the bottom to the top.

    Args:
        layers: number of layers.
        cuts: layers, in increasing order, after whose attention the model is divided.
    """
    edges = (None, *cuts, None)
    return tuple(
        LayerPart(
            range(0 if low is None else low + 1, layers if cut is None else cut + 1),
            range(low or 0, layers if cut is None else cut),
            cut,
        )
        for low, cut in pairwise(edges)
    )


def choose_cuts(layers: int, first_layers: Iterable[int]) -> tuple[int, ...]:
    """Return the cuts of a model, in increasing order: where its experts begin.

    Args:
        layers: number of layers.
        first_layers: lowest layer of each plugged expert.
    """
    default = layers - DEFAULT_EXPERT_LAYERS
    counts = Counter(layer for layer in first_layers if layer != default)
    by_experts = [layer for layer, _ in sorted(counts.items(), key=lambda item: (-item[1], item))]
    least = max(1, LEAST_SHARE * layers)
    worthwhile = [layer for layer in (default, *by_experts) if layer >= least]
    return tuple(sorted(worthwhile[:CUTS]))
