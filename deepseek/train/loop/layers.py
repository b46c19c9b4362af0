"""Parse the layers of an expert: `all`, `last:3`, or a list such as `0-9,20`."""

import re

from deepseek.errors import ConfigError

PART = re.compile(r"(\d+)(?:-(\d+))?")


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Return the sorted layer indices that `text` names.

    Args:
        text: `all`, `last:N`, or indices and ranges separated by commas.
        num_layers: number of layers of the model.

    Raises:
        ConfigError: `text` is malformed or exceeds the model.
    """
    words = text.replace(" ", "")
    if words == "all":
        return tuple(range(num_layers))
    if match := re.fullmatch(r"last:(\d+)", words):
        count = int(match[1])
        if not 1 <= count <= num_layers:
            raise ConfigError(f"layers={text!r} is impossible; the model has {num_layers} layers.")
        return tuple(range(num_layers - count, num_layers))
    chosen: set[int] = set()
    for part in words.split(","):
        match = PART.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"layers={text!r} is not understood; write all, last:3, or indices such as 0-9,20."
            )
        first = int(match[1])
        last = int(match[2] or match[1])
        if last < first or last >= num_layers:
            raise ConfigError(
                f"layers={text!r} is impossible; the model has layers 0 to {num_layers - 1}."
            )
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))
