"""Eight automatically armed experts on one base against each expert alone and against merging: loss
on public text, and share of each expert's gain that is kept.

    python benchmarks/corpora.py all
    python benchmarks/base_and_gain.py [--set design|final] [--corpora DIR] [--tokens 100000] [--json FILE]

Each expert is trained separately; an interrupted run resumes, and finished experts are kept. Then
all are plugged. Every text is scored on rows that no expert was trained on; the frozen trunk is
computed once:

    base      no expert
    alone     the text's own expert at every token (for mixed and public texts: the best single one)
    set       all plugged, arming "auto"
    averaging all eight outputs with weight 1/8 at every token
    soup      one expert whose weights are the mean of all eight
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from entry import existing_path, run_main
from results import resumed, write
from torch import Tensor

import deepseek
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home
from deepseek.data import Batch, Document, RowLoader, TokenShards, read_folder
from deepseek.data.text.encode import CONTEXT_BIT
from deepseek.kernels.cross_entropy import token_losses
from deepseek.model.experts import ExpertModule
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.pack import read_pack
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.loop.losses import mean_loss
from deepseek.train.loop.packed import resume_rows
from deepseek.train.text.trunk_cache import run_trunk

SETS = {
    "design": ("code-a", "code-b", "spanish", "french", "science", "german", "chinese", "prose"),
    "final": (
        "final-textual",
        "final-litestar",
        "final-scrapy",
        "final-maxima",
        "final-octave",
        "final-spanish",
        "final-french",
        "final-japanese",
    ),
}
"""Experts used for design decisions, and others used for the reported figures."""

PUBLIC = {
    "design": ("public-prose", "public-code"),
    "final": ("final-public-prose", "final-public-code"),
}
ALTERNATING = {
    "design": (
        ("spanish", "french"),
        ("code-a", "code-b"),
        ("german", "chinese"),
        ("science", "prose"),
    ),
    "final": (
        ("final-spanish", "final-french"),
        ("final-textual", "final-litestar"),
        ("final-maxima", "final-octave"),
        ("final-scrapy", "final-japanese"),
    ),
}
COMMENTED = {"design": ("code-a", "german"), "final": ("final-textual", "final-spanish")}
ORDERS = 6
ROW_LENGTH, BATCH_ROWS = 2048, 1


class Everywhere:
    """Armed experts without gates: adds every module's weighted output at every token."""

    adapts = False
    """Modules change only feed-forward networks."""

    def __init__(self, modules: Sequence[ExpertModule], *weights: float) -> None:
        self.pairs = list(zip(modules, weights, strict=True))

    def apply(self, layer_idx: int, x_BTD: Tensor, y_BTD: Tensor, _: Any) -> Tensor:
        return y_BTD + sum(weight * module(layer_idx, x_BTD) for module, weight in self.pairs)


Variant = Callable[[], Any]
"""Returns what is armed in one forward pass; None: the base alone."""


@dataclass(frozen=True)
class Text:
    """Rows to score; `experts` are those whose domains the text mixes."""

    name: str
    shards: TokenShards
    experts: tuple[str, ...] = ()

    def batches(self, tokens: int) -> list[Batch]:
        loader = RowLoader(self.shards, BATCH_ROWS, ROW_LENGTH, seed=1)
        rows = loader.order(0, min(loader.num_rows, max(1, tokens // ROW_LENGTH)))
        return [loader.rows(rows[i : i + BATCH_ROWS]) for i in range(0, len(rows), BATCH_ROWS)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--corpora", type=existing_path, default=home() / "corpora")
    parser.add_argument(
        "--work",
        type=Path,
        default=home() / "base-and-gain",
        help="experts and texts are kept here",
    )
    parser.add_argument(
        "--tokens", type=int, default=100_000, help="distinct tokens each expert is trained on"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--check", type=int, default=16_384, help="held-out tokens of each training"
    )
    parser.add_argument(
        "--score",
        type=int,
        help="tokens each text is scored on in the comparison; default: --check",
    )
    parser.add_argument("--set", choices=SETS, default="final", help="which eight experts")
    parser.add_argument(
        "--experts", nargs="+", help="trained experts to compare in place of the set's eight"
    )
    parser.add_argument(
        "--chats", type=existing_path, help="conversations, one a line, as for chat_neutrality.py"
    )
    parser.add_argument("--only", nargs="*", help="train these experts and stop")
    parser.add_argument("--json", type=Path, help="file to write, and a picture beside it")
    options = parser.parse_args()
    options.experts = tuple(options.experts or SETS[options.set])
    resumed(options.work)
    for name in options.only or options.experts:
        train(options, name)
    if not options.only:
        compare(options)


def train(options: argparse.Namespace, name: str) -> None:
    deepseek.train_expert(
        options.base,
        name=name,
        from_folder=options.corpora / name,
        tokens=options.tokens,
        epochs=options.epochs,
        out=pack_path(options.work, name),
        run_folder=options.work / "runs" / name,
        held_out_tokens=options.check,
    )


def pack_path(work: Path, name: str) -> Path:
    return work / "packs" / f"{name}.safetensors"


def compare(options: argparse.Namespace) -> None:
    """Score all texts, print the table, and write JSON and a picture."""
    started = time.monotonic()
    model = DeepSeekModel.from_pretrained(options.base, dtype="auto")
    for name in options.experts:
        model.experts.plug(pack_path(options.work, name))
    modules = {
        name: ExpertModule.from_pack(read_pack(pack_path(options.work, name)), model.dtype)
        for name in options.experts
    }
    rows = [score(model, modules, text, options.score or options.check) for text in texts(options)]
    summary = summarise(rows)
    if options.experts == SETS[options.set]:
        same_bits = (
            len({order_digest(model, options, order) for order in orders(options.experts)}) == 1
        )
        summary |= {"orders": ORDERS, "every_order_same_bits": same_bits}
    print_table(rows, summary)
    if options.json:
        gates = {name: gate_papers(options.work, name) for name in options.experts}
        figures = {
            "summary": summary,
            "texts": rows,
            "gates": gates,
            "seconds": round(time.monotonic() - started),
        }
        write(options.json, figures)
        draw(rows, options.experts, options.json.with_suffix(".png"))


def gate_papers(work: Path, name: str) -> dict[str, Any]:
    return read_pack(pack_path(work, name)).manifest.gate.model_dump()


def score(
    model: DeepSeekModel, modules: dict[str, ExpertModule], text: Text, tokens: int
) -> dict[str, Any]:
    """Return the losses of one text under every variant, and the mean weight of each expert."""
    forced = text.experts if len(text.experts) == 1 else tuple(modules)
    everyone = list(modules.values())
    soup = soup_of(everyone)
    variants: dict[str, Variant] = {
        "base": lambda: None,
        "set": model.experts.armed,
        "averaging": lambda: Everywhere(everyone, *[1.0 / len(everyone)] * len(everyone)),
        "soup": lambda: Everywhere([soup], 1.0),
    } | {f"alone {name}": lambda name=name: Everywhere([modules[name]], 1.0) for name in forced}
    with model.experts.record() as trace:
        losses = losses_of(
            model, text.batches(tokens), variants, min(module.layers[0] for module in everyone)
        )
    alone = {name: losses.pop(f"alone {name}") for name in forced}
    best = min(alone, key=lambda name: alone[name])
    row = {
        "text": text.name,
        "experts": text.experts,
        **losses,
        "alone": alone[best],
        "best": best,
        "singles": alone,
    }
    row["weights"] = {name: round(float(trace.weights(name).mean()), 4) for name in modules}
    row["gain_kept"] = (row["base"] - row["set"]) / (row["base"] - row["alone"])
    return row


@torch.no_grad()
def losses_of(
    model: DeepSeekModel, batches: list[Batch], variants: dict[str, Variant], first: int
) -> dict[str, float]:
    """Return the mean loss of each variant; the trunk below layer `first` is shared and runs once
    per batch.
    """
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in variants}
    for batch in batches:
        with model.experts.arming(None):
            stream_BTD = run_trunk(model, first, batch)
        for name, variant in variants.items():
            hidden_BTD = above(model, first, batch, stream_BTD, variant())
            losses = token_losses(
                hidden_BTD.flatten(0, 1), model.lm_head.weight, batch.labels.flatten()
            )
            parts[name].append((losses, batch.labels.flatten()))
    return {name: mean_loss(found).loss for name, found in parts.items()}


def above(model: DeepSeekModel, first: int, batch: Batch, stream_BTD: Tensor, armed: Any) -> Tensor:
    """Return the final hidden states after the norm, `[B, T, D]`, with `armed` experts."""
    step = resume_rows(model, batch, stream_BTD, first)
    step.ctx.armed = armed
    return step.finish()


def soup_of(modules: Sequence[ExpertModule]) -> ExpertModule:
    """Return a module with the mean weights of `modules`, which had the same initial weights."""
    first = modules[0]
    soup = ExpertModule("soup", first.layers, first.hidden_size, first.width)
    states = [module.state_dict() for module in modules]
    soup.load_state_dict(
        {key: torch.stack([s[key].float() for s in states]).mean(0) for key in states[0]}
    )
    return soup.to(next(first.parameters()).dtype)


def texts(options: argparse.Namespace) -> Iterator[Text]:
    """Yield the texts: public, each expert's own, mixed."""
    tokenizer = load_tokenizer(resolve(options.base))

    def built(name: str, documents: Callable[[], list[Document]]) -> TokenShards:
        # Opens existing shards of the same documents and tokenizer.
        return TokenShards.build(documents(), tokenizer, options.work / "texts" / name)

    for name in PUBLIC[options.set]:
        yield Text(name, built(name, lambda name=name: list(read_folder(options.corpora / name))))
    if options.chats:
        yield Text("public-chats", built("chats", lambda: chats(options.chats)))
    for name in options.experts:
        yield Text(name, held_out(options, name), (name,))
    if options.experts != SETS[options.set]:  # mixed texts need the whole set
        return
    code, german = COMMENTED[options.set]
    documents = built(
        f"commented-{options.set}", lambda: commented(options, tokenizer, code, german)
    )
    yield Text("code, foreign comments", documents, (code, german))
    for pair in ALTERNATING[options.set]:
        name = f"{pair[0]} / {pair[1]}"
        yield Text(
            name,
            built("-".join(pair), lambda pair=pair: alternating(options, tokenizer, *pair)),
            pair,
        )


def held_out(options: argparse.Namespace, name: str) -> TokenShards:
    return TokenShards(options.work / "runs" / name / "corpus" / "held-out")


def decoded(options: argparse.Namespace, tokenizer: Any, name: str, count: int) -> list[str]:
    """Return the first held-out documents of an expert as text."""
    shards = held_out(options, name)
    spans = list(zip(shards.offsets[:-1].tolist(), shards.offsets[1:].tolist(), strict=True))[
        :count
    ]
    return [
        tokenizer.decode(np.asarray(shards.ids_N[a : b - 1] & ~CONTEXT_BIT).tolist())
        for a, b in spans
    ]


def chats(path: Path) -> list[Document]:
    """Return the user turns of each conversation as one document."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Document("\n".join(record["turns"]), f"chat-{number}")
        for number, record in enumerate(records)
    ]


def commented(
    options: argparse.Namespace, tokenizer: Any, code_name: str, comment_name: str
) -> list[Document]:
    """Return held-out code with held-out sentences of another language as comments."""
    rng = random.Random(0)
    german = "\n".join(decoded(options, tokenizer, comment_name, 60)).splitlines()
    sentences = [line.strip() for line in german if 40 < len(line.strip()) < 200]
    documents = []
    for index, code in enumerate(decoded(options, tokenizer, code_name, 16)):
        lines: list[str] = []
        for number, line in enumerate(code[:6000].splitlines()):
            if number % 8 == 0:
                indent = line[: len(line) - len(line.lstrip())]
                lines += [f"{indent}# {sentence}" for sentence in rng.sample(sentences, 3)]
            lines.append(line)
        documents.append(Document("\n".join(lines), f"commented-{index}"))
    return documents


def alternating(
    options: argparse.Namespace, tokenizer: Any, first: str, second: str
) -> list[Document]:
    """Return documents of 500-character pieces that alternate between two experts' held-out
    texts.
    """
    pools = ["\n\n".join(decoded(options, tokenizer, name, 40)) for name in (first, second)]
    pieces = [[pool[i : i + 500] for i in range(0, min(len(pool), 60_000), 500)] for pool in pools]
    turns = [f"{a}\n\n{b}" for a, b in zip(*pieces, strict=False)]
    return [
        Document("\n\n".join(turns[i : i + 6]), f"{first}-{second}-{i}")
        for i in range(0, len(turns), 6)
    ]


def orders(experts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return plug orders: as named, reversed, and random ones."""
    rng = random.Random(0)
    return [
        experts,
        experts[::-1],
        *(tuple(rng.sample(experts, len(experts))) for _ in range(ORDERS - 2)),
    ]


def order_digest(model: DeepSeekModel, options: argparse.Namespace, order: Sequence[str]) -> str:
    """Return a digest of the logits of a mixed text after the experts are plugged in this order."""
    for name in options.experts:
        model.experts.unplug(name)
    for name in order:
        model.experts.plug(pack_path(options.work, name))
    batch = Text(
        "mixed", TokenShards(options.work / "texts" / "-".join(ALTERNATING[options.set][0]))
    ).batches(BATCH_ROWS * ROW_LENGTH)[0]
    with torch.no_grad():
        logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    return hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the summary: change on public text, gain kept, mixed texts and mean losses."""
    public = {row["text"]: row for row in rows if not row["experts"]}
    own = [row for row in rows if len(row["experts"]) == 1]
    mixed = [row for row in rows if len(row["experts"]) == 2]
    return {
        "public_change_percent": {
            name: round(100 * (row["set"] / row["base"] - 1), 3) for name, row in public.items()
        },
        "gain_kept_percent": {row["text"]: round(100 * row["gain_kept"], 1) for row in own},
        "mixed_set_minus_best_single": {
            row["text"]: round(row["set"] - row["alone"], 4) for row in mixed
        },
        "held_out_mean": {
            name: round(sum(row[name] for row in own) / len(own), 4)
            for name in ("base", "alone", "set", "averaging", "soup")
        },
    }


def print_table(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    columns = ("base", "alone", "set", "averaging", "soup")
    print(f"{'text':24}" + "".join(f"{name:>11}" for name in columns) + "  gain kept   who speaks")
    for row in rows:
        speakers = sorted(row["weights"].items(), key=lambda item: -item[1])[:3]
        said = ", ".join(f"{name} {weight:.3f}" for name, weight in speakers if weight >= 0.001)
        kept = f"{100 * row['gain_kept']:9.1f} %" if row["experts"] else f"{'':11}"
        print(
            f"{row['text']:24}"
            + "".join(f"{row[name]:11.4f}" for name in columns)
            + f"{kept}  {said}"
        )
    for name, value in summary.items():
        print(f"{name}: {value}")


def draw(rows: list[dict[str, Any]], experts: tuple[str, ...], path: Path) -> None:
    """Draw each expert's mean weight on each text."""
    weights = np.array([[row["weights"][name] for name in experts] for row in rows])
    figure, axes = plt.subplots(figsize=(7.5, 6.5))
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(experts)), experts, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [row["text"] for row in rows])
    for (i, j), weight in np.ndenumerate(weights):
        if weight >= 0.005:
            axes.text(
                j,
                i,
                f"{weight:.2f}",
                ha="center",
                va="center",
                color="white" if weight > 0.5 else "black",
            )
    axes.set_title("Mean weight of each expert, nothing armed by hand")
    figure.colorbar(image, shrink=0.6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_main(main)
