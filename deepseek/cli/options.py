"""Options shared by several commands."""

import sys
from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[
    str, typer.Option(help="Base model: a known name, a folder, a GGUF file or a hub id.")
]
Experts = Annotated[
    str,
    typer.Option(
        help="Experts to plug: names or pack files, comma-separated; 'all': every trained one."
    ),
]
Arm = Annotated[str, typer.Option(help="Experts to arm: 'auto', 'none', or comma-separated names.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Most tokens to generate.")]
Temperature = Annotated[
    float, typer.Option(help="Sampling temperature; 0 takes the most likely token.")
]
TopP = Annotated[
    float, typer.Option(help="Sample from the most likely tokens with this total probability.")
]
Int8 = Annotated[bool, typer.Option(help="Quantise weights to 8 bits where that is faster.")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the sampling; the same seed gives the same text.")
]


def names(text: str) -> list[str]:
    """Return the parts of a comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]


def arming(text: str) -> str | list[str] | None:
    """Return the argument of `model.experts.arm` for a value of the option `--arm`."""
    return {"auto": "auto", "none": None}.get(text.strip(), names(text))


def expert_packs(text: str, base: str, folder: Path | None = None) -> list[Path | str]:
    """Return the packs in the option `--experts`; "all" means every expert of this base.

    With "all", a pack that cannot be read is reported and left out, so that one damaged file does
    not prevent the others from being plugged.

    Args:
        text: the option's value.
        base: name of the base model.
        folder: folder that "all" searches; default: the folder of trained experts.
    """
    if text.strip() != "all":
        return list(names(text))
    from deepseek.packs.library import packs_for

    packs, problems = packs_for(base, folder)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    return list(packs.values()) if folder else list(packs)
