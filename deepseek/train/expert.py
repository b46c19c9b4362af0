"""`deepseek.train_expert`: from a pile of text to an expert pack, the base untouched.

documents -> clean -> split -> token shards -> plan -> trunk cache -> train -> calibrate the gates -> pack
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home, write_json
from deepseek.data.split import Rule
from deepseek.model.pretrained import read_config
from deepseek.packs.library import SUFFIX, experts_folder
from deepseek.packs.manifest import Metric
from deepseek.packs.pack import write_pack
from deepseek.train.budget import Plan
from deepseek.train.corpus import Source
from deepseek.train.expert_run import ExpertRequest, ExpertRun
from deepseek.train.layers import parse_layers
from deepseek.train.loop import check_config
from deepseek.train.memory import peak_memory
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
    resume: str = "",
    dry_run: bool = False,
) -> Path:
    """Train an expert module on text and return the path of its pack; interrupted, the same call goes on.

    Args:
        out: path of the pack; default `<name>.safetensors` in the folder of trained experts.
        run_folder: default `runs/<name>` in the library's home.
        quiet: show no progress.
        resume: the command that continues the run, named when it is stopped.
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
    pack = Path(out) if out else experts_folder() / f"{name}{SUFFIX}"
    run = Path(run_folder) if run_folder else home() / "runs" / name
    with ProgressBar(quiet=quiet) as progress, _stoppable(resume):
        if dry_run:
            progress.say(str(estimate(request, progress)))
        else:
            _train(request, run, pack, progress, resume)
    return pack


def _recipe(base: str, layers: str) -> Recipe:
    """Return the recipe for these layers of a base model."""
    num_layers = read_config(resolve(base))["num_hidden_layers"]
    return CACHED if parse_layers(layers, num_layers)[0] > 0 else WHOLE


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        plan: rows, steps and seconds.
        tokens: distinct tokens to train on.
        cache_bytes, pack_bytes: on disk.
        memory_bytes: peak so far, one whole training step included.
    """

    plan: Plan
    tokens: int
    cache_bytes: int
    pack_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        plan = self.plan
        return (
            f"{self.tokens:,} tokens in {plan.steps} steps, about {plan.seconds / 60:.1f} minutes; memory "
            f"{self.memory_bytes / 1e9:.1f} GB, trunk cache {self.cache_bytes / 1e6:,.0f} MB, pack "
            f"{self.pack_bytes / 1e6:,.0f} MB"
        )


def estimate(request: ExpertRequest, progress: ProgressBar) -> Estimate:
    """Check a request and measure what it would take; nothing is left behind."""
    with tempfile.TemporaryDirectory() as folder:
        run = ExpertRun(request, Path(folder), progress)
        texts = run.texts(run.corpus())
        plan = run.plan_for(texts, run.measure(texts))
        row_bytes = request.row_length * run.model.config.hidden_size
        cache = (plan.rows * 2 + plan.held_out_rows * run.model.dtype.itemsize) * row_bytes if run.cached_below else 0
        pack = sum(parameter.numel() * 2 for parameter in run.module.parameters())
        return Estimate(plan, plan.rows * request.row_length, cache, pack, peak_memory())


def _train(request: ExpertRequest, folder: Path, path: Path, progress: ProgressBar, resume: str) -> None:
    """Run all stages, or nothing if the run folder says that the pack is finished and it is there."""
    check_config(folder / "request.json", request.as_json())
    summary = folder / "result.json"
    if summary.is_file() and path.is_file():
        progress.say(f"{path} is finished")
        return
    run = ExpertRun(request, folder, progress)
    corpus = run.corpus()
    texts = run.texts(corpus)
    write_json(folder / "request.json", request.as_json())  # not before it is known to be possible
    plan = run.plan(texts)
    result = run.train(texts, plan, resume)
    seconds = time.monotonic() - run.started  # of this call, as the minutes are counted: without the gates
    progress.say("calibrating the gates")
    gates = run.calibrate(texts, plan)
    held_out = Metric(before=run.first_loss(), after=result.metrics["held_out_loss"])
    write_pack(path, run.pack(held_out, (corpus.train.digest,), corpus.commit))
    figures = {"plan": asdict(plan), "gates": asdict(gates), "peak_memory": peak_memory(), **held_out.model_dump()}
    write_json(summary, {"pack": str(path), "seconds": seconds, **asdict(result.position), **figures})
    run.drop_trunk()
    change = held_out.after / held_out.before - 1
    progress.say(
        f"held-out loss {held_out.before:.4f} -> {held_out.after:.4f} ({change:+.1%}), recall {gates.recall:.1%}, "
        f"false positives {gates.false_positives:.1%}, peak memory {peak_memory() / 1e9:.1f} GB, {path}"
    )


@contextmanager
def _stoppable(resume: str) -> Iterator[None]:
    """Say at Ctrl-C how to go on; every stage keeps what it has done."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if stop.args:
            raise
        hint = resume or "call again with the same arguments"
        raise KeyboardInterrupt(f"stopped, what is done is kept; to go on: {hint}") from None
