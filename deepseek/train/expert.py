"""`deepseek.train_expert`: from a pile of text to an expert pack, the base untouched.

documents -> clean -> split -> token shards -> plan -> trunk cache -> train -> calibrate the gates -> pack
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home
from deepseek.data.split import Rule
from deepseek.model.pretrained import read_config
from deepseek.packs.library import SUFFIX, experts_folder
from deepseek.train.corpus import Source
from deepseek.train.expert_run import ExpertRequest, ExpertRun
from deepseek.train.job import run_once
from deepseek.train.layers import parse_layers
from deepseek.train.progress import ProgressBar

DEFAULT_MINUTES = 5.0


@dataclass(frozen=True)
class Recipe:
    """Dials that a user need not know; measured, see LOG.md.

    Attributes:
        width: of the expert's feed-forward networks.
        epochs: passes over the text.
        batch_rows: rows a step; small, as steps are what is scarce.
        learning_rate: the peak.
    """

    width: int
    epochs: int
    batch_rows: int
    learning_rate: float


CACHED = Recipe(width=512, epochs=3, batch_rows=4, learning_rate=4e-3)
"""With a trunk cache: further passes are cheap."""

WHOLE = Recipe(width=256, epochs=1, batch_rows=2, learning_rate=3e-3)
"""Experts from layer 0 on: every pass costs the same, so new text at each."""

TextPath = str | Path | None


def train_expert(
    base: str = "smollm2-135m",
    *,
    name: str,
    from_git: TextPath = None,
    from_folder: TextPath = None,
    from_jsonl: TextPath = None,
    from_parquet: TextPath = None,
    layers: str = "last:3",
    width: int | None = None,
    minutes: float | None = None,
    tokens: int | None = None,
    epochs: int | None = None,
    out: str | Path | None = None,
    run_folder: str | Path | None = None,
    held_out: float = 0.1,
    split: Rule = "file",
    row_length: int = 512,
    batch_rows: int | None = None,
    learning_rate: float | None = None,
    held_out_tokens: int = 8192,
    licence: str = "LicenseRef-Unknown",
    domain: str = "",
    seed: int = 0,
    quiet: bool = False,
    dry_run: bool = False,
) -> Path:
    """Train an expert module on text and return the path of its pack; interrupted, the same call goes on.

    Args:
        out: path of the pack; default `<name>.safetensors` in the folder of trained experts.
        run_folder: default `runs/<name>` in the library's home.
        quiet: show no progress.
        dry_run: check everything, show what the run would take, and change nothing.
        Others: see `ExpertRequest`, `Source` and `Recipe`, which says what is taken where None is given; without
            `minutes` and `tokens`, five minutes.

    Raises:
        DataError, TrainError, ConfigError, HubError: with the cause and the mend.
        KeyboardInterrupt: after Ctrl-C; its message says how to go on.
    """
    source = Source.at(from_git, from_folder, from_jsonl, from_parquet, held_out=held_out, by=split, seed=seed)
    recipe = _recipe(base, layers)
    request = ExpertRequest(
        base=base, name=name, source=source, layers=layers,
        width=width or recipe.width, minutes=DEFAULT_MINUTES if minutes is None and tokens is None else minutes,
        tokens=tokens, epochs=epochs or recipe.epochs, row_length=row_length,
        batch_rows=batch_rows or recipe.batch_rows, learning_rate=learning_rate or recipe.learning_rate,
        held_out_tokens=held_out_tokens, licence=licence, domain=domain, seed=seed,
    )  # fmt: skip
    pack, folder = Path(out or experts_folder() / f"{name}{SUFFIX}"), Path(run_folder or home() / "runs" / name)
    with ProgressBar(quiet=quiet) as progress:
        job = partial(ExpertRun, request, out=pack, progress=progress)
        return run_once(job, folder, pack, request.as_json(), progress, dry_run)


def _recipe(base: str, layers: str) -> Recipe:
    """Return the recipe for these layers of a base model."""
    num_layers = read_config(resolve(base))["num_hidden_layers"]
    return CACHED if parse_layers(layers, num_layers)[0] > 0 else WHOLE
