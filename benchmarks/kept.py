"""Figures of a part of a measurement, kept so that an interrupted one goes on where it was."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepseek.checkpoint.store import read_object, write_json


def kept(
    path: Path, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return figures that were kept with the same settings, or else measure and keep them.

    Args:
        path: JSON file that they are kept in.
        settings: all that the figures depend on, as JSON: options, digests of models and of texts.
        measure: measures them; called if `path` is not there or holds figures of other settings.
    """
    found = read_object(path) if path.exists() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "figures": measure()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    figures: dict[str, Any] = found["figures"]
    return figures
