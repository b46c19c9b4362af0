"""Which layers are trained: parse `all`, `last:3`, or a list such as `0-9,20`, and name their
parameters.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepseek import checks
from deepseek.errors import ConfigError, shown

if TYPE_CHECKING:
    from deepseek.model.transformer import DeepSeekModel

PART = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def parse_layers(text: str, layers: int | Sequence[int]) -> tuple[int, ...]:
    """Return the sorted layer indices that `text` names.

    Args:
        text: `all`, `last:N`, or indices and ranges separated by commas.
        layers: number of layers of the model, or the layers that can have an expert, ascending.

    Raises:
        ConfigError: `text` is malformed or exceeds the model.
    """
    possible = range(layers) if isinstance(layers, int) else layers
    words = checks.text("layers", text).replace(" ", "")
    if words == "all":
        return tuple(possible)
    if match := re.fullmatch(r"last:([0-9]{1,9})", words):
        count = int(match[1])
        if not 1 <= count <= len(possible):
            raise ConfigError(
                f"layers={shown(text)} is impossible; the model has {len(possible)} layers."
            )
        return tuple(possible[-count:])
    chosen: set[int] = set()
    for part in words.split(","):
        match = PART.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"layers={shown(text)} is not understood; write all, last:3, or indices "
                "such as 0-9,20."
            )
        first = int(match[1])
        last = int(match[2] or match[1])
        if last < first or last > possible[-1]:
            raise ConfigError(
                f"layers={shown(text)} is impossible; the model has layers {possible[0]} to "
                f"{possible[-1]}."
            )
        chosen.update(range(first, last + 1))
    if strange := chosen - set(possible):
        raise ConfigError(
            f"layers={shown(text)} is impossible: layer {min(strange)} has no feed-forward "
            f"network; choose among {', '.join(map(str, possible))}."
        )
    return tuple(sorted(chosen))


def trained_prefixes(model: "DeepSeekModel", first: int) -> tuple[str, ...]:
    """Return the name prefixes of the parameters that belong to layers from `first` on.

    Experts that a layer below shares are not among them.
    """
    layers = [f"layers.{index}." for index in range(first, len(model.layers))]
    lowest = -(-first // model.config.expert_sharing)
    pools = [f"expert_pools.{index}." for index in range(lowest, len(model.expert_pools))]
    return (*layers, *pools, "norm.")
