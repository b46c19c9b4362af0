"""Gain of LoRA by share of trained parameters, beside full fine-tuning and the last three layers.

    python benchmarks/corpora.py code-b code-c
    python benchmarks/lora_curve.py CORPORA/code-b CORPORA/code-c [--bases smollm2-135m] [--json FILE]

Learning rates are chosen on the first text, with a quarter of the tokens: for three shares by
doubling and halving from a start value until the held-out loss rises on both sides; other shares
use the rate of the nearest one. Then each share is trained on the second text. `gain` is the
decrease of the loss on its held-out files, and `of_full` that gain in per cent of full
fine-tuning's. Adapters have the largest rank that fits into the share; if even rank 1 on all usual
targets does not fit, only `down_proj` is adapted. An interrupted run resumes.
"""

import argparse
import math
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from entry import existing_path, run_main
from results import add_output, resumed, write

import deepseek
import deepseek.train.jobs.adapt as adaptation
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home, read_object, write_json
from deepseek.errors import ConfigError
from deepseek.model.transformer import DeepSeekModel

SHARES = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)
SEARCHED = (0.001, 0.005, 0.02)
"""Shares for which the learning rate is searched."""

LOWEST_RATE = 1e-6
"""Where the search of a learning rate ends at the latest."""

STARTS = {"lora": 4e-3, "last-n": 1e-3, "full": 2e-4}
"""Learning rates at which the search starts."""

TARGETS = adaptation.TARGETS
FEWER_TARGETS = ("down_proj",)
ARTICLE = (0.001, 90.0)
"""The article's claim: share of the parameters, and per cent of full fine-tuning's gain."""

HELD_OUT = 0.15


@dataclass(frozen=True)
class Way:
    """A way to adapt the model.

    Attributes:
        mode: mode of `deepseek.adapt`.
        rank: rank of the adapters; None: no LoRA.
        targets: projections with an adapter.
    """

    mode: str
    rank: int | None = None
    targets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.mode if self.rank is None else f"rank-{self.rank}-{'-'.join(self.targets)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chosen", type=existing_path, help="text on which rates are chosen")
    parser.add_argument("reported", type=existing_path, help="text that figures come from")
    parser.add_argument("--bases", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--tokens", type=int, default=60_000, help="distinct, of the second text")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=home() / "lora-curve", help="outcomes are kept here"
    )
    add_output(parser, "lora_curve")
    options = parser.parse_args()
    resumed(options.work)
    bases = {}
    for base in options.bases:
        bases[base] = Curve(base, options).figures()
        write(options.json, {"bases": bases})
    draw(bases, options.json.with_suffix(".png"))


class Curve:
    """All trainings of one base."""

    def __init__(self, base: str, options: argparse.Namespace) -> None:
        self.base, self.options = base, options
        model = DeepSeekModel.from_pretrained(resolve(base))
        self.ways = {share: way_within(model, share) for share in options.shares}

    def figures(self) -> dict[str, Any]:
        """Return each way's learning rate and its figures on the second text, by mode or, for LoRA,
        by the smallest share that its adapters fit into.
        """
        searched = [share for share in self.ways if share in SEARCHED] or list(self.ways)[:1]
        ways = [Way("full"), Way("last-n"), *(self.ways[share] for share in searched)]
        rates = {way: self.rate(way) for way in ways}
        for share, way in self.ways.items():
            nearest = min(searched, key=lambda one: abs(math.log(one / share)))
            rates[way] = rates[self.ways[nearest]]
        outcomes = {way: self.trained(self.options.reported, way, rates[way], 1) for way in rates}
        full = outcomes[Way("full")]["gain"]
        names = {Way("full"): "full", Way("last-n"): "last-n"}
        names |= {way: f"{share:g}" for share, way in reversed(self.ways.items())}
        return {
            names[way]: {
                **asdict(way),
                **outcome,
                "rate": rates[way],
                "of_full": 100 * outcome["gain"] / full,
            }
            for way, outcome in outcomes.items()
        }

    def rate(self, way: Way) -> float:
        """Return the learning rate with the lowest loss on the first text."""
        losses: dict[float, float] = {}

        def loss(rate: float) -> float:
            if rate not in losses:
                found = self.trained(self.options.chosen, way, rate, 4)
                losses[rate] = found["held_out_loss"]
            return losses[rate]

        best = STARTS[way.mode]
        # Rates so high that the base stays the best step have equal losses: lower ones follow.
        while best > LOWEST_RATE and loss(best / 2) <= loss(best):
            best /= 2
        while loss(2 * best) < loss(best):
            best *= 2
        return best

    def trained(self, text: Path, way: Way, rate: float, part: int) -> dict[str, Any]:
        """Return the figures of a training on `1 / part` of the tokens; run it if not done yet."""
        base = re.sub(r"[^\w.-]+", "-", self.base)  # a path becomes one folder name
        budget = f"{self.options.tokens}-tokens-{self.options.epochs}-epochs"
        place = self.options.work / base / text.name / budget
        folder = place / f"{way.name}-{rate:g}-{part}"
        outcome = folder / "outcome.json"
        if not outcome.is_file():
            adaptation.TARGETS = way.targets or TARGETS
            deepseek.adapt(
                self.base,
                name=folder.name,
                mode=way.mode,
                rank=way.rank,
                from_folder=text,
                held_out=HELD_OUT,
                tokens=self.options.tokens // part,
                epochs=self.options.epochs,
                learning_rate=rate,
                out=folder / "model",
                run_folder=folder / "run",
                quiet=True,
            )
            record = read_object(folder / "run" / "result.json")["figures"]
            write_json(outcome, self.row(record))
            for large in ("model", "run"):
                shutil.rmtree(folder / large)
        found = read_object(outcome)
        print(self.base, text.name, folder.name, found, flush=True)
        return found

    def row(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the figures to keep of a training."""
        parameters = DeepSeekModel.from_pretrained(resolve(self.base)).num_parameters()
        kept = ("held_out_loss_before", "held_out_loss", "trained_parameters", "steps", "seconds")
        return {
            **{name: record[name] for name in kept},
            "share": record["trained_parameters"] / parameters,
            "gain": record["held_out_loss_before"] - record["held_out_loss"],
        }


def way_within(model: DeepSeekModel, share: float) -> Way:
    """Return the adapters with the largest rank that fits into a share of the parameters."""
    adaptation.TARGETS = TARGETS
    try:
        return Way("lora", adaptation.largest_rank(model, share), TARGETS)
    except ConfigError:
        return Way("lora", 1, FEWER_TARGETS)


def draw(bases: dict[str, Any], path: Path) -> None:
    """Plot the gain, relative to full fine-tuning's, over the share of trained parameters."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for base, figures in bases.items():
        adapters = [row for row in figures.values() if row["mode"] == "lora"]
        adapters.sort(key=lambda row: row["share"])
        axes.plot(
            [100 * row["share"] for row in adapters],
            [row["of_full"] for row in adapters],
            marker="o",
            label=f"{base}, LoRA",
        )
        last = figures["last-n"]
        axes.plot(100 * last["share"], last["of_full"], "s", label=f"{base}, last layers")
    share, percent = ARTICLE
    axes.plot(100 * share, percent, "k*", markersize=12, label="the article")
    axes.axhline(100, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters, % of all")
    axes.set_ylabel("gain of held-out loss, % of full fine-tuning's")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    run_main(main)
