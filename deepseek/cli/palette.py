"""Which colour an expert speaks in."""

from collections.abc import Iterable

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")


class Palette:
    """Hands out one colour per expert; a name keeps its colour for the whole session. Text of the base has none."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._colours: dict[str, str] = {}
        for name in names:
            self.style(name)

    def style(self, expert: str | None) -> str:
        """Return the style in which a token of `expert` (None: the base alone) is printed."""
        if expert is None:
            return ""
        return self._colours.setdefault(expert, COLOURS[len(self._colours) % len(COLOURS)])
