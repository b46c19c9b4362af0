"""Which positional encoding trained on short rows still works on long ones: small models on real
code.

    python benchmarks/position_length.py CODE [CODE ...] [--rivals dpe yarn learned] [--seeds 0 1 2]

Every rival is the same small model with the same data, order, seeds and number of steps; it is
trained on rows of 1,024 tokens and scored on rows of 4,096 from files that were held out: by the
next token, and by lines, which are completed if the model would write the whole line after what
precedes it, greedily and to the line's end. "yarn" is
the model of "rope" with its frequencies scaled for the test (arXiv:2309.00071), and "dpe+yarn" that
of "dpe" likewise. Tokens are the most frequent ids of the SmolLM2 tokenizer; rarer ones count as
one unknown token, which is no target. A run that was stopped goes on where it was, and one that is
finished is not repeated; all are in `--runs`. The table, `position_length.json` and `.png` cover
whatever is finished. `benchmarks/corpora.py code-a code-b` fetches code.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from results import add_output, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deepseek import DeepSeekModel, ModelConfig
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home, write_json
from deepseek.text.tokenizer import encode_plain, load_tokenizer
from deepseek.train.loop.loop import LoopConfig, LossOutput, train
from deepseek.train.loop.optim import OptimConfig
from deepseek.train.loop.progress import ProgressBar

SHORT, LONG = 1024, 4096
BIN = 256  # neighbouring positions that are averaged
BATCH = 1
VOCAB = 2048
UNKNOWN, END = 0, 1
HELD_OUT = 0.1  # of the files

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": LONG / SHORT,
    "original_max_position_embeddings": SHORT,
}


@dataclass(frozen=True)
class Rival:
    """An encoding: its config in training, what changes in the test, and whose training it
    shares.
    """

    fields: dict[str, Any]
    test_fields: dict[str, Any]
    trained_as: str


RIVALS = {
    "learned": Rival({"positional_encoding": "learned"}, {}, "learned"),
    "rope": Rival({"positional_encoding": "rope"}, {}, "rope"),
    "yarn": Rival({"positional_encoding": "rope"}, {"rope_parameters": YARN}, "rope"),
    "alibi": Rival({"positional_encoding": "alibi"}, {}, "alibi"),
    "none": Rival({"positional_encoding": "none"}, {}, "none"),
    "dpe": Rival({"positional_encoding": "dpe", "train_len": SHORT}, {}, "dpe"),
    "dpe+yarn": Rival(
        {"positional_encoding": "dpe", "train_len": SHORT}, {"rope_parameters": YARN}, "dpe"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("code", nargs="+", type=Path, help="folders of source files")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=650)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--test-rows", type=int, default=40)
    parser.add_argument("--runs", type=Path, default=home() / "bench" / "position_length")
    add_output(parser, "position_length")
    options = parser.parse_args()
    stream, rows, ends_line = corpus(options.code, options.test_rows)
    folder = options.runs / run_name(options)
    for seed in options.seeds:
        for name in options.rivals:
            record = folder / f"{name}-{seed}.json"
            if not record.exists():
                tested = train_rival(options, RIVALS[name], seed, stream, folder)
                write_json(record, tested.figures | score(tested.model, rows, ends_line))
            show(name, seed, json.loads(record.read_text()))
    report(folder, options)


def run_name(options: argparse.Namespace) -> str:
    """Return a name for the budget: figures of different budgets are never mixed."""
    text = " ".join(path.name for path in options.code)
    dials = (
        "next tokens and lines",  # records of before had no lines
        text,
        options.steps,
        options.width,
        options.layers,
        options.learning_rate,
        options.test_rows,
    )
    return sha256(repr(dials).encode()).hexdigest()[:12]


def corpus(folders: list[Path], test_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the training files as one stream of ids, rows `[N, 4097]` of held-out files that are
    long enough, and for each id whether it ends a line, `[VOCAB]`.
    """
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    texts = encode_plain(tokenizer, [path.read_text(errors="replace") for path in files])
    held = [
        int(sha256(path.name.encode()).hexdigest(), 16) % 1000 < 1000 * HELD_OUT for path in files
    ]
    known = Counter(
        i for ids, out in zip(texts, held, strict=True) if not out for i in ids
    ).most_common(VOCAB - 2)
    new_id = {old: new for new, (old, _) in enumerate(known, start=2)}
    mapped = [torch.tensor([new_id.get(i, UNKNOWN) for i in ids] + [END]) for ids in texts]
    stream = torch.cat([ids for ids, out in zip(mapped, held, strict=True) if not out])
    long = [ids for ids, out in zip(mapped, held, strict=True) if out and len(ids) > LONG]
    rows = [
        ids[start : start + LONG + 1] for ids in long for start in range(0, len(ids) - LONG, SHORT)
    ]
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:test_rows]
    ends_line = torch.zeros(VOCAB, dtype=torch.bool)
    for old, new in new_id.items():
        ends_line[new] = "\n" in tokenizer.decode([old])
    return stream, torch.stack([rows[i] for i in chosen]), ends_line


class Windows:
    """Random rows `[B, 1025]` of the stream, the same for every rival of a seed."""

    def __init__(self, stream: Tensor, seed: int) -> None:
        self.stream, self.seed, self.count = stream, seed, 0

    def next(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.count)
        self.count += 1
        starts = torch.randint(len(self.stream) - SHORT, (BATCH, 1), generator=generator)
        return self.stream[starts + torch.arange(SHORT + 1)]

    def state(self) -> dict[str, int]:
        return {"count": self.count}

    def load(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class NextToken:
    """Trains all weights of a model on rows of ids."""

    def __init__(self, model: DeepSeekModel) -> None:
        self.model = model

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def loss(self, rows: Tensor, step: int) -> LossOutput:
        logits = self.model(rows[:, :-1]).logits
        targets = targets_of(rows)
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return LossOutput(loss, int((targets >= 0).sum()))

    def evaluate(self) -> dict[str, float]:
        return {}


def targets_of(rows: Tensor) -> Tensor:
    """Return the next token of each, -100 where it is unknown."""
    return torch.where(rows[:, 1:] == UNKNOWN, -100, rows[:, 1:])


def config_of(options: argparse.Namespace, fields: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=options.width,
        intermediate_size=8 * options.width // 3 // 16 * 16,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 32,
        max_position_embeddings=LONG,
        use_cache=False,
        **fields,
    )


@dataclass(frozen=True)
class Trained:
    """A rival after its training, as it is tested, and what the training took."""

    model: DeepSeekModel
    figures: dict[str, Any]


def train_rival(
    options: argparse.Namespace, rival: Rival, seed: int, stream: Tensor, folder: Path
) -> Trained:
    """Train a rival, or go on with its training."""
    torch.manual_seed(seed)
    model = DeepSeekModel(config_of(options, rival.fields)).train()
    optim = OptimConfig(options.learning_rate, warmup=0.1, weight_decay=0.1)
    loop = LoopConfig(
        optim, options.steps, evaluate_every=options.steps, checkpoint_every=200, keep=1, seed=seed
    )
    started = time.perf_counter()
    with ProgressBar() as progress:
        train(
            NextToken(model),
            Windows(stream, seed),
            loop,
            folder / f"{rival.trained_as}-{seed}",
            progress=progress,
        )
    seconds = time.perf_counter() - started
    tested = DeepSeekModel(config_of(options, rival.fields | rival.test_fields)).eval()
    tested.load_state_dict(model.state_dict())
    size = sum(parameter.numel() for parameter in model.parameters())
    return Trained(tested, {"seconds": round(seconds, 1), "parameters": size})


@torch.no_grad()
def score(model: DeepSeekModel, rows: Tensor, ends_line: Tensor) -> dict[str, list[float]]:
    """Return mean loss in nats, top-1 accuracy in per cent, and lines and those of them that are
    completed, of each bin of positions.
    """
    losses, hits, known, lines, completed = torch.zeros(5, LONG // BIN)
    for row in rows.split(1):
        logits, targets = model(row[:, :-1]).logits[0].float(), targets_of(row)[0]
        loss = cross_entropy(logits, targets, ignore_index=-100, reduction="none")
        right = logits.argmax(-1) == targets
        losses += binned(loss)
        hits += binned(right)
        known += binned(targets >= 0)
        for start, end in lines_of(row[0], ends_line):
            lines[start // BIN] += 1
            completed[start // BIN] += right[start:end].all()
    return {
        "loss": (losses / known).tolist(),
        "top1": (100 * hits / known).tolist(),
        "lines": lines.tolist(),
        "completed": completed.tolist(),
    }


def binned(values: Tensor) -> Tensor:
    """Return the sum of each bin of positions."""
    return values.float().unflatten(0, (-1, BIN)).sum(-1)


def lines_of(row: Tensor, ends_line: Tensor) -> list[tuple[int, int]]:
    """Return the predictions `[start, end)` of each line of a row with its end, of at least three
    tokens, all of them known.
    """
    ends = ends_line[row].nonzero().flatten().tolist()
    unknown = (row == UNKNOWN).tolist()
    return [
        (before, end)
        for before, end in pairwise(ends)
        if end - before >= 3 and not any(unknown[before + 1 : end + 1])
    ]


def summary(record: dict[str, Any]) -> dict[str, float]:
    """Return the figures of the table."""
    loss, top1 = record["loss"], record["top1"]
    short, far = SHORT // BIN, 2 * SHORT // BIN
    return {
        "top1_to_1024": mean(top1[:short]),
        "top1_1024_2048": mean(top1[short:far]),
        "top1_2048_4096": mean(top1[far:]),
        "loss_at_1024": loss[short - 1],
        "loss_at_4096": loss[-1],
        "lines_to_1024": completed_share(record, 0, short),
        "lines_2048_4096": completed_share(record, far, LONG // BIN),
    }


def completed_share(record: dict[str, Any], first: int, last: int) -> float:
    """Return the share of the lines in bins `[first, last)` that are completed, in per cent."""
    lines = sum(record["lines"][first:last])
    return 100 * sum(record["completed"][first:last]) / max(1, lines)


def show(name: str, seed: int, record: dict[str, Any]) -> None:
    figures = "  ".join(f"{key} {value:.3f}" for key, value in summary(record).items())
    print(f"{name:8} seed {seed}  {record['seconds']:.0f} s  {figures}", flush=True)


def report(folder: Path, options: argparse.Namespace) -> None:
    """Print the table over all finished runs of this budget and write JSON and picture."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in RIVALS}
    for path in sorted(folder.glob("*-*.json")):
        found[path.stem.rsplit("-", 1)[0]].append(json.loads(path.read_text()))
    finished = {name: records for name, records in found.items() if records}
    table = {name: averages(records) for name, records in finished.items()}
    for name, row in table.items():
        means = {key: value for key, value in row.items() if key != "by_seed"}
        print(f"{name:8} " + "  ".join(f"{key} {value:.3f}" for key, value in means.items()))
    budget = {
        name: getattr(options, name)
        for name in ("steps", "width", "layers", "learning_rate", "test_rows")
    }
    curves = {
        name: {kind: curve(records, kind) for kind in ("loss", "top1")}
        for name, records in finished.items()
    }
    write(
        options.json,
        {"budget": budget | {"batch_tokens": BATCH * SHORT}, "table": table, "curves": curves},
    )
    plot(curves, options.json.with_suffix(".png"))


def averages(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over seeds, and the figures of each."""
    rows = [summary(record) for record in records]
    means = {key: mean(row[key] for row in rows) for key in rows[0]}
    return {"seeds": len(rows), **means, "by_seed": rows}


def curve(records: list[dict[str, Any]], kind: str) -> list[float]:
    """Return the mean over seeds of each bin."""
    return [mean(values) for values in zip(*(record[kind] for record in records), strict=True)]


def plot(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw accuracy and loss by position, one line a rival."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, kind, label in zip(
        figure.subplots(1, 2), ("top1", "loss"), ("top-1, %", "loss, nats"), strict=True
    ):
        for name, both in curves.items():
            axes.plot(
                [BIN * (i + 0.5) for i in range(len(both[kind]))],
                both[kind],
                "o-",
                markersize=3,
                label=name,
            )
        axes.axvline(SHORT, color="grey", linestyle=":")
        axes.set(xlabel="position", ylabel=label)
    # One rival's failure hides the others.
    axes.set_ylim(top=1.5 * min(max(both["loss"]) for both in curves.values()))
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
