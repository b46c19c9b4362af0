"""Cache of figures, so that an interrupted measurement can resume."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepseek.checkpoint.store import read_object, write_json


def kept(
    path: Path, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return the figures kept with the same settings, or measure and keep them.

    Args:
        path: JSON file that they are kept in.
        settings: everything that the figures depend on, as JSON: options, digests of models and of
            texts.
        measure: measures them; called if `path` is missing or holds figures of other settings.
    """
    found = read_object(path) if path.exists() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "figures": measure()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    figures: dict[str, Any] = found["figures"]
    return figures
