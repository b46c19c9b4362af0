"""Options shared by several commands."""

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepseek.checkpoint.files import expanded
from deepseek.checks import MAX_SEED
from deepseek.cli.output import echo
from deepseek.device.names import ABOUT_DEVICE, ABOUT_DTYPE, Dtype
from deepseek.errors import ConfigError

if TYPE_CHECKING:
    from deepseek.checkpoint.wheels import Progress
    from deepseek.engine.load import Packs

Base = Annotated[
    str, typer.Option(help="Base model: a known name, a folder, a GGUF file or a hub id.")
]
Experts = Annotated[
    str,
    typer.Option(
        help="Experts to plug: names or pack files, comma-separated, 'all' trained ones, or "
        "'none', the default of generate and export. NAME=WEIGHT arms one by name and scales what "
        "it adds, by up to 2."
    ),
]
Arm = Annotated[
    str,
    typer.Option(
        help="Experts to arm: 'auto', 'none', or comma-separated names, also NAME=WEIGHT. "
        "Default: as --experts says, else 'auto'."
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Maximum tokens to generate.")]
Temperature = Annotated[
    float, typer.Option(min=0, max=10, help="Sampling temperature; 0 takes the most likely token.")
]
TopP = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Sample from the most likely tokens with this total probability."
    ),
]
Int8 = Annotated[
    bool,
    typer.Option(help="Quantise weights to 8 bits where that is faster; --dtype overrides it."),
]
Device = Annotated[str, typer.Option(help=f"{ABOUT_DEVICE}.")]
Precision = Annotated[Dtype, typer.Option("--dtype", help=f"{ABOUT_DTYPE}.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; the reference has its schema.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and print the estimates only.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0, max=MAX_SEED, help="Seed of the sampling; the same seed gives the same text."
    ),
]


def private_key(path: Path | None) -> Path | None:
    """Return the value of an option for a private key.

    Raises:
        ConfigError: the file is the public key of a pair.
    """
    if path is not None and path.suffix == ".pub":
        raise ConfigError(
            f"{path} is a public key; sign with the private key of the pair, "
            f"{path.with_suffix('.pem')}."
        )
    return path


Key = Annotated[
    Path | None,
    typer.Option(
        callback=private_key, help="Sign with a private key from `deepseek expert keygen`."
    ),
]


def refuse_ignored(rule: str, **options: object) -> None:
    """Refuse options that a command would ignore, so that nobody takes them for heeded.

    Args:
        rule: when they count, such as "goes with --ray".
        options: values by the name of the option with underscores; None: not given.

    Raises:
        ConfigError: one of them is given.
    """
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {rule}; leave it out.")


def existing_folder(option: str, folder: Path | None) -> Path | None:
    """Return the folder that an option names, with `~` replaced: shells leave it in `--option=~/x`.

    Args:
        option: name of the option, such as "--experts-folder".
        folder: its value; None: not given.

    Raises:
        ConfigError: it is not a folder.
    """
    place = folder and expanded(folder)
    if place is not None and not place.is_dir():
        raise ConfigError(f"{option} {folder} is not a folder; make it, or name one that exists.")
    return place


def usable_home() -> None:
    """Refuse a home that is, or is below, a file: a list of what it holds would be empty.

    Raises:
        NotADirectoryError: it is.
    """
    from deepseek.checkpoint.store import home

    place = next(place for place in (home(), *home().absolute().parents) if place.exists())
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(home()))


def names(text: str) -> list[str]:
    """Return the parts of a comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]


def arming(text: str) -> str | dict[str, float] | None:
    """Return the argument of `model.experts.arm` for a value of the option `--arm`.

    Raises:
        ConfigError: it names nothing, a name comes twice, or a weight is not a number.
    """
    if text.strip() in ("auto", "none"):
        return {"auto": "auto", "none": None}[text.strip()]
    weights_by_name = weights(text)
    if not weights_by_name:
        raise ConfigError(f"{text!r} names no expert to arm; give names, auto or none.")
    return {name: 1.0 if weight is None else weight for name, weight in weights_by_name.items()}


def weights(text: str) -> dict[str, float | None]:
    """Return the names in a comma-separated option with their weights, None without "=WEIGHT".

    Raises:
        ConfigError: a weight is not a number, or a name comes twice.
    """
    weights_by_name: dict[str, float | None] = {}
    for part in names(text):
        name, weight = _parse_weight(part)
        if name in weights_by_name:
            raise ConfigError(f"The expert {name!r} is given twice in {text!r}; name it once.")
        weights_by_name[name] = weight
    return weights_by_name


def _parse_weight(part: str) -> tuple[str, float | None]:
    """Return the name and the weight of NAME=WEIGHT; None: there is no weight."""
    name, equals, number = part.rpartition("=")
    if not equals:
        return part, None
    try:
        return name.strip(), float(number)
    except ValueError:
        if Path(part).is_file():  # a path with "=" in it
            return part, None
        raise ConfigError(
            f"The weight {number!r} of {name!r} is not a number; write NAME=0.7."
        ) from None


def expert_packs(
    text: str, base: str, folder: Path | None = None, progress: "Progress | None" = None
) -> "Packs":
    """Return the packs in the option `--experts`; "all" means every expert of this base.

    "none" and "" give no packs. With "all", a pack that cannot be read is reported and left out,
    so that one damaged file does not prevent the others from being plugged.

    Args:
        text: the option's value.
        base: name or folder of the base model.
        folder: folder of the packs; default: the folder of trained experts.
        progress: callback for fetching the base, which "all" needs; None: no reports.

    Raises:
        CheckpointError, HubError: "all" experts are asked for, and the base cannot be loaded.
        ConfigError: a weight is not a number, or a name comes twice.
        PackError: there is no such expert.
    """
    from deepseek.packs.library import find_pack, packs_for

    if text.strip() == "none":
        return []
    if text.strip() != "all":
        return {str(find_pack(name, folder)): weight for name, weight in weights(text).items()}
    packs, problems = packs_for(base, folder, progress)
    for problem in problems:
        echo(f"warning: {problem}", error=True)
    return list(packs.values()) if folder else list(packs)
