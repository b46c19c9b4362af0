"""Options that several commands share."""

import sys
from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[str, typer.Option(help="Base model: a known name, a folder or a hub id.")]
Experts = Annotated[
    str,
    typer.Option(
        help="Experts to plug: names or packs, separated by commas; 'all' = all there are."
    ),
]
Arm = Annotated[
    str, typer.Option(help="Which of them may speak: 'auto', 'none', or names separated by commas.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Most tokens to generate.")]
Temperature = Annotated[
    float, typer.Option(help="0 takes the likeliest token; higher values vary more.")
]
TopP = Annotated[
    float, typer.Option(help="Choose among the likeliest tokens that hold this probability.")
]
Int8 = Annotated[bool, typer.Option(help="Round weights to 8 bits where that is quicker.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]


def names(text: str) -> list[str]:
    """Return the parts of a comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]


def arming(text: str) -> str | list[str] | None:
    """Return what `model.experts.arm` takes for the option `--arm`."""
    return {"auto": "auto", "none": None}.get(text.strip(), names(text))


def expert_packs(text: str, base: str, folder: Path | None = None) -> list[Path | str]:
    """Return the packs that `--experts` names; "all" means every expert of this base in `folder`.

    One that cannot be read is reported and left out, so that a damaged file does not take the
    others with it.

    Args:
        text: the option's value.
        base: name of the base model.
        folder: where "all" looks; None takes that of trained experts.
    """
    if text.strip() != "all":
        return list(names(text))
    from deepseek.packs.library import packs_for

    found, problems = packs_for(base, folder)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return list(found.values()) if folder else list(found)
