"""Increase of SmolLM2's loss on unseen text of 8,192 tokens when all layers but the first two get
LSH attention.

    python benchmarks/hash_recall.py                  # fits the hashes
    python benchmarks/lsh_slot_in.py
    python benchmarks/lsh_slot_in.py --far-field --skip-random --tune 200
    python benchmarks/lsh_slot_in.py --test final-public-prose final-scrapy ...    # to report

All models are scored on the same texts. Probes, windows and tuning were chosen on the default
texts, so reported figures come from others.

`--tune` trains the attention projections of the LSH layers, with the hash and all other weights
fixed, towards the exact model's predictions (KL divergence at every fourth token), on texts of the
corpora that the hashes were fitted on, one per step; none of them is scored. If these texts are
shorter, windows are reduced in proportion, so that the share of keys attended to stays the same.
The texts' own next tokens are not used as targets, so the tuned model cannot learn what the exact
model does not know: it can only regain what LSH lost.

Tuning is saved every twenty steps; the same command resumes it.
"""

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from entry import run_main
from hash_recall import BASE, FIRST, FIT, PROBES, TEST, WINDOWS, corpus, fitted, hash_file
from results import FOLDER, write

import deepseek
from deepseek.checkpoint.store import home, load_state, save_state
from deepseek.data.text.encode import long_texts
from deepseek.kernels.lsh.intervals import Windows
from deepseek.model.attention.hash import plug_hashes
from deepseek.model.config import ModelConfig
from deepseek.model.precision import autocast
from deepseek.train.loop.optim import (
    OptimConfig,
    adamw,
    clip_gradients,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)

PARTS = ("whole", "second half")
SAVE_EVERY = 20  # steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument(
        "--test", nargs="+", default=TEST, metavar="CORPUS", help="texts that are scored"
    )
    parser.add_argument("--texts", type=int, default=1, help="of each corpus")
    parser.add_argument("--window", type=int, help="keys of a bucket looked at")
    parser.add_argument("--local", type=int, help="nearest keys looked at")
    parser.add_argument("--probes", type=int, help="buckets a query looks into")
    parser.add_argument(
        "--far-field", action="store_true", help="look at summaries of the rest, too"
    )
    parser.add_argument(
        "--tune", type=int, default=0, metavar="STEPS", help="then train so many steps, 200 at most"
    )
    parser.add_argument("--tune-length", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--rate", type=float, default=3e-5, help="learning rate of tuning")
    parser.add_argument("--score-every", type=int, default=50, metavar="STEPS")
    parser.add_argument(
        "--skip-random", action="store_true", help="measure the distilled hash only"
    )
    parser.add_argument(
        "--json", type=Path, help="default: results/lsh_slot_in...json by its options"
    )
    options = parser.parse_args()
    windows = WINDOWS[options.length]
    looks = {
        "lsh_probes": options.probes or PROBES[options.length],
        "lsh_bucket_window": options.window or windows.bucket,
        "lsh_local_window": options.local or windows.local,
        "lsh_far_field": options.far_field,
    }
    full, tokenizer = deepseek.load(BASE, dtype="float32")
    config = ModelConfig(
        attention="lsh",
        lsh_num_buckets=windows.num_buckets,
        lsh_exact_layers=list(range(FIRST)),
        **looks,
    )
    distilled, _ = deepseek.load(BASE, config=config, dtype="float32")
    plug_hashes(distilled, fitted(full, tokenizer, "distilled"))
    models = {"distilled": distilled}
    if not options.skip_random:
        models["random"] = deepseek.load(BASE, config=config, dtype="float32").model
    texts = [
        (name, long_texts(corpus(name), tokenizer, options.texts, options.length, seed=1))
        for name in options.test
    ]
    scored: dict[str, Any] = {"exact": full, **models}
    if not options.tune:
        figures = {kind: score(kind, model, texts) for kind, model in scored.items()}
    else:
        documents = [document for name in FIT for document in corpus(name)]
        lessons_RT = long_texts(documents, tokenizer, options.tune, options.tune_length, seed=2)
        tuning = Tuning(distilled, full, options.rate, options.tune_length / options.length)
        state = state_folder(looks, options)
        figures = tuning.restore(state)
        if not figures:
            figures = {kind: score(kind, model, texts) for kind, model in scored.items()}
            tuning.save(state, figures)
        for step in tuning.steps(lessons_RT):
            if step % options.score_every == 0 or step == len(lessons_RT):
                kind = f"after {step} steps"
                figures[kind] = score(kind, distilled, texts)
                print(kind, change(figures[kind], figures["exact"]), flush=True)
            if step % SAVE_EVERY == 0 or step % options.score_every == 0:
                tuning.save(state, figures)
    changes = {
        kind: change(one, figures["exact"]) for kind, one in figures.items() if kind != "exact"
    }
    for kind, parts in changes.items():
        print(f"{kind:20}", "  ".join(f"{part} {parts[part]:+.2%}" for part in PARTS))
    name = "lsh_slot_in" + (f"_{options.probes}_probes" if options.probes else "")
    name += "_far" * options.far_field + "_tuned" * bool(options.tune)
    write(
        options.json or FOLDER / f"{name}.json",
        {
            "length": options.length,
            "test": options.test,
            **looks,
            "tune": options.tune,
            "tune_length": options.tune_length,
            "rate": options.rate,
            "losses": figures,
            "change": changes,
        },
    )
    if options.tune:
        shutil.rmtree(state)  # the same command starts again


def change(mine: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, float]:
    return {
        part: sum(row[part] for row in mine) / sum(row[part] for row in base) - 1 for part in PARTS
    }


def score(kind: str, model: Any, texts: list[tuple[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Return the losses of each text."""
    rows = [{"corpus": name} | losses(model, ids_T) for name, ids_RT in texts for ids_T in ids_RT]
    print(kind, rows, flush=True)
    return rows


def state_folder(looks: dict[str, Any], options: argparse.Namespace) -> Path:
    """Return the folder of a tuning's saved state; its name depends on the settings."""
    named = ("length", "test", "texts", "tune", "tune_length", "rate", "skip_random")
    made_of = repr((sorted(looks.items()), [getattr(options, name) for name in named]))
    hashes = hash_file("distilled", None).stem
    return home() / "lsh-slot-in" / f"{hashes}-{sha256(made_of.encode()).hexdigest()[:12]}"


class Tuning:
    """Trains the attention projections of all layers but the first two towards an exact model.

    Windows are scaled by `scale` during steps, and have their full size whenever `steps` yields.
    """

    def __init__(self, model: Any, exact: Any, rate: float, scale: float) -> None:
        self.model = model
        self.exact = exact
        self.config = OptimConfig(rate)
        self.done = 0
        model.requires_grad_(False)
        self.trained = {
            f"{layer}.{name}": parameter
            for layer, block in enumerate(model.layers[FIRST:], FIRST)
            for name, parameter in block.attention.named_parameters()
        }
        for parameter in self.trained.values():
            parameter.requires_grad_()
        self.optimizer = adamw(self.trained, self.config)
        self.layers = [block.attention for block in model.layers[FIRST:]]
        self.windows = self.layers[0].windows
        self.small = replace(
            self.windows,
            local=round(scale * self.windows.local),
            bucket=round(scale * self.windows.bucket),
        )

    def save(self, folder: Path, figures: dict[str, Any]) -> None:
        """Save weights, optimizer and figures."""
        moments = optimizer_tensors(self.optimizer, self.trained)
        save_state(folder, {**self.trained, **moments}, {"done": self.done, "figures": figures})

    def restore(self, folder: Path) -> dict[str, Any]:
        """Restore the saved state and return its figures; empty if nothing was saved."""
        if not folder.exists():
            return {}
        tensors, meta = load_state(folder)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[name])
        load_optimizer_tensors(self.optimizer, self.trained, tensors)
        self.done = meta["done"]
        figures: dict[str, Any] = meta["figures"]
        return figures

    def steps(self, lessons_RT: torch.Tensor) -> Iterator[int]:
        """Train on the remaining texts, one per step; yield the number done after each step."""
        for step in range(self.done, len(lessons_RT)):
            started = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config, step, len(lessons_RT))
            self.model.train()
            self._look(self.small)
            loss = self._step(lessons_RT[step], step)
            self.model.eval()
            self._look(self.windows)
            seconds = time.perf_counter() - started
            print(f"step {step + 1}/{len(lessons_RT)} KL {loss:.5f} {seconds:.0f} s", flush=True)
            self.done = step + 1
            yield self.done

    def _look(self, windows: Windows) -> None:
        for layer in self.layers:
            layer.windows = windows

    def _step(self, ids_T: torch.Tensor, step: int) -> float:
        """Take one step and return its loss."""
        # Every fourth token: the output head dominates the cost, and neighbours teach similar
        # things.
        inputs = {"use_cache": False, "logits_to_keep": torch.arange(step % 4, len(ids_T), 4)}
        with autocast(self.model):
            with torch.no_grad():
                goal_TV = self.exact(ids_T[None], **inputs).logits[0]
            found_TV = self.model(ids_T[None], **inputs).logits[0]
            loss = torch.nn.functional.kl_div(
                found_TV.float().log_softmax(-1),
                goal_TV.float().log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            )
        loss.backward()
        clip_gradients(self.trained.values(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


@torch.no_grad()
def losses(model: Any, ids_T: torch.Tensor) -> dict[str, float]:
    """Return the mean loss in nats per token over the whole text and over its second half, where
    far keys matter.
    """
    logits_TV = model(ids_T[None], use_cache=False).logits[0, :-1]
    pairs = zip(logits_TV.split(1024), ids_T[1:].split(1024), strict=True)
    loss_T = torch.cat(
        [torch.nn.functional.cross_entropy(*pair, reduction="none") for pair in pairs]
    )
    return {"whole": float(loss_T.mean()), "second half": float(loss_T[len(loss_T) // 2 :].mean())}


if __name__ == "__main__":
    run_main(main)
