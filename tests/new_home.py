"""A separate library home for a test."""

from pathlib import Path

from deepseek.checkpoint.store import home


def new_home(folder: Path) -> Path:
    """Return an empty home that shares only the texts for calibrating gates."""
    folder.mkdir()
    (folder / "public").symlink_to(home() / "public")
    return folder
