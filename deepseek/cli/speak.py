"""Print a generated text as it comes, each token in the colour of the expert that spoke."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from deepseek.cli.options import arming, expert_packs
from deepseek.engine.engine import Engine
from deepseek.engine.request import Request
from deepseek.engine.start import start_engine

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")


class Palette:
    """Hands out one colour per expert; a name keeps its colour for the whole session. Text of the
    base has none.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._colours: dict[str, str] = {}
        for name in names:
            self.style(name)

    def style(self, expert: str | None) -> str:
        """Return the style in which a token of `expert` (None: the base alone) is printed."""
        if expert is None:
            return ""
        return self._colours.setdefault(expert, COLOURS[len(self._colours) % len(COLOURS)])


@contextmanager
def opened(base: str, experts: str, arm: str, int8: bool) -> Iterator[Engine]:
    """Give the engine that the options of `chat` and `generate` ask for, within the block."""
    with Console(stderr=True).status(f"loading {base}"):
        engine = start_engine(base, experts=expert_packs(experts, base), int8=int8)
    with engine:
        engine.arm(arming(arm))
        yield engine


def speak(
    engine: Engine, request: Request, console: Console, palette: Palette
) -> tuple[str, Mapping[str | None, int]]:
    """Print the answer to `request` and return it, and how many tokens each expert (None: the base
    alone) spoke.

    However the caller leaves, Ctrl-C among others, the engine computes no more of it.
    """
    generation = engine.submit(request)
    texts = []
    try:
        for event in generation:
            style = palette.style(event.expert)
            console.print(
                event.text, style=style, end="", markup=False, highlight=False, soft_wrap=True
            )
            texts.append(event.text)
            if event.error:
                raise RuntimeError(event.error)
    finally:
        generation.cancel()
    console.print()
    return "".join(texts), generation.usage.experts


def legend(shares: Mapping[str | None, int], palette: Palette) -> str:
    """Return one line of Rich markup that says who spoke how many tokens."""
    parts = []
    for expert, count in sorted(shares.items(), key=lambda share: -share[1]):
        style = palette.style(expert)
        parts.append(f"[{style}]{expert}[/] {count}" if expert else f"base {count}")
    return "[dim]tokens:[/] " + ", ".join(parts or ["none"])
