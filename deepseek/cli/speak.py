"""Print a generated text as it comes, each token in the colour of the expert that spoke."""

from collections import Counter
from collections.abc import Iterable

from rich.console import Console

from deepseek.cli.palette import Palette
from deepseek.infer.request import TokenEvent


def speak(pieces: Iterable[TokenEvent], console: Console, palette: Palette) -> tuple[str, Counter[str | None]]:
    """Print `pieces` and return the text and how many tokens each expert (None: the base alone) spoke."""
    texts: list[str] = []
    shares: Counter[str | None] = Counter()
    for piece in pieces:
        console.print(
            piece.text, style=palette.style(piece.expert), end="", markup=False, highlight=False, soft_wrap=True
        )
        texts.append(piece.text)
        shares[piece.expert] += 1
    console.print()
    return "".join(texts), shares


def legend(shares: Counter[str | None], palette: Palette) -> str:
    """Return one line of Rich markup that says who spoke how many tokens."""
    parts = []
    for expert, count in shares.most_common():
        style = palette.style(expert)
        parts.append(f"[{style}]{expert}[/] {count}" if expert else f"base {count}")
    return "[dim]tokens:[/] " + ", ".join(parts or ["none"])
