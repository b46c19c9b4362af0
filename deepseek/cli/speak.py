"""Print generated text as it streams, each token in the colour of the expert that wrote it."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

from deepseek.cli.options import arming, expert_packs
from deepseek.cli.output import plain
from deepseek.cli.pull import fetch
from deepseek.cli.wrap import WordWrap
from deepseek.device.choose import choose_device, choose_dtype
from deepseek.device.names import Dtype
from deepseek.engine.engine import Engine
from deepseek.engine.request import Request
from deepseek.engine.start import start_engine
from deepseek.terminal import visible
from deepseek.train.loop.progress import ProgressBar

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")


class Palette:
    """Assigns one colour per expert for the whole session; text of the base has no colour.

    Args:
        names: experts that get the first colours, in this order; default: none.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._colours: dict[str, str] = {}
        for name in names:
            self.style(name)

    def style(self, expert: str | None) -> str:
        """Return the Rich style for tokens of an expert; None means the base alone."""
        if expert is None:
            return ""
        return self._colours.setdefault(expert, COLOURS[len(self._colours) % len(COLOURS)])


@contextmanager
def open_engine(
    base: str, experts: str, arm: str, *, int8: bool, device: str, dtype: Dtype
) -> Iterator[Engine]:
    """Start the engine for the options of `chat` and `generate`; close it after the block.

    Args:
        base: option `--base`.
        experts: option `--experts`.
        arm: option `--arm`.
        int8: option `--int8`.
        device: option `--device`.
        dtype: option `--dtype`.
    """
    choose_dtype(dtype, choose_device(device))  # before a base is fetched
    arm_argument = arming(arm or "auto")
    fetch(base)
    packs = expert_packs(experts, base)
    with ProgressBar(quiet=not sys.stderr.isatty()) as progress:
        engine = start_engine(
            base, experts=packs, int8=int8, device=device, dtype=dtype, progress=progress
        )
    with engine:
        if arm:
            engine.arm(arm_argument)
        yield engine


def speak(
    engine: Engine, request: Request, console: Console, palette: Palette
) -> tuple[str, Mapping[str | None, int]]:
    """Print the answer to a request and return it.

    If the caller is interrupted, for example by Ctrl-C, the generation is cancelled.

    Args:
        engine: a running engine.
        request: the request to submit.
        console: where to print.
        palette: colours of the experts.

    Returns:
        The text, and the number of tokens written by each expert (None: the base alone).
    """

    generation = engine.submit(request)
    wrap = WordWrap.on(console, partial(emit, console))
    texts = []
    try:
        for event in generation:
            wrap.write(event.text, palette.style(event.expert))
            texts.append(event.text)
            if event.error:
                raise RuntimeError(event.error)
    finally:
        generation.cancel()
        wrap.close()
    console.print()
    return "".join(texts), generation.usage.experts


def emit(console: Console, text: str, style: str) -> None:
    """Print a piece of generated text as it is: Rich's `Text` would make spaces of its tabs, which
    Makefiles and tables need.

    Args:
        console: where to print; what is no terminal gets no colour.
        text: text, whose control characters are written out; line breaks and tabs stay.
        style: Rich style; empty: none.
    """
    visible_text = visible(text, lines=True)
    if not console.is_terminal:
        console.file.write(visible_text)
        console.file.flush()
        return
    segment = Segment(visible_text, console.get_style(style) if style else None)
    console.print(Segments([segment]), end="", soft_wrap=True)


def legend(shares: Mapping[str | None, int], palette: Palette) -> Text:
    """Return one line for Rich with the number of tokens written by each expert."""
    parts = [
        plain(expert or "base", palette.style(expert)) + plain(f" {count}")
        for expert, count in sorted(shares.items(), key=lambda share: -share[1])
    ]
    return plain("tokens: ", "dim") + Text(", ").join(parts or [Text("none")])
