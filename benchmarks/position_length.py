"""Which positional encodings, trained on short rows, still work on long ones: small models on real
code.

    python benchmarks/position_length.py CODE [CODE ...] [--rivals dpe yarn drope] [--seeds 0 1 2]
    python benchmarks/position_length.py CODE [CODE ...] --test-length 4096 8192

Every rival is the same small model with the same data, order, seeds and number of steps. It is
trained on rows of 1,024 tokens and scored on rows of 4,096 (`--test-length`) from held-out files:
by the next token, by whole lines and by needles (`long_rows.py`). Learned positions end at 4,096.

"yarn" is the trained "rope" model with its frequencies scaled for the test (arXiv:2309.00071), and
"dpe+yarn" the "dpe" model likewise; "dpe+scale" is the "dpe" model with scaled scores, as below.
"drope" (arXiv:2512.12167) is trained with rotary positions for seven eighths of the steps and
without positions for the last eighth, which has its own warm-up and decay of the learning rate.
"drope+" starts from the finished "rope" model, so it adds little work, but it has an eighth more
steps than the others. Both are tested with attention scores multiplied by the factor that gives the
lowest loss on training text of the test's length.

The vocabulary is the most frequent ids of the SmolLM2 tokenizer; rarer ones are one unknown token,
which is never a target. Interrupted runs resume, and finished ones are not repeated; all are in
`--runs`. The table, `position_length.json` and `.png` cover all finished runs, the picture only the
first length. `benchmarks/corpora.py code-a code-b` fetches code.
"""

import argparse
import json
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from code_rows import BATCH, SHORT, VOCAB, Corpus, Windows, read_corpus
from entry import existing_path, run_main
from long_rows import BIN, needles, score, summary, targets_of
from results import add_output, resumed, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deepseek import DeepSeekModel, ModelConfig
from deepseek.checkpoint.store import home, write_json
from deepseek.train.loop.loop import LoopConfig, LossOutput, train
from deepseek.train.loop.optim import OptimConfig
from deepseek.train.loop.progress import ProgressBar

LONG = 4096  # positions of the trained models, and default of `--test-length`
HEAD_WIDTH = 32
RECALIBRATION = 1 / 8  # share of the steps that DroPE trains without positions
FACTORS = (1.0, 1.1, 1.2, 1.3, 1.4)  # candidate factors on attention scores in the test
TUNING_ROWS = 4  # rows of training text on which the factor is chosen

ROPE = {"positional_encoding": "rope"}
NONE = {"positional_encoding": "none"}


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        fields: config fields.
        share: number of steps, as a share of `--steps`.
        start: training whose final weights it starts from; "": random weights.
    """

    fields: dict[str, Any]
    share: float = 1.0
    start: str = ""


TRAININGS = {
    "learned": Training({"positional_encoding": "learned"}),
    "rope": Training(ROPE),
    "alibi": Training({"positional_encoding": "alibi"}),
    "none": Training(NONE),
    "dpe": Training({"positional_encoding": "dpe", "train_len": SHORT}),
    "scaffold": Training(ROPE, 1 - RECALIBRATION),
    "drope": Training(NONE, RECALIBRATION, start="scaffold"),
    "drope+": Training(NONE, RECALIBRATION, start="rope"),
}


@dataclass(frozen=True)
class Rival:
    """A trained model as it is tested.

    Attributes:
        training: key of `TRAININGS`; rivals that differ only in the test share one.
        yarn: whether its frequencies are scaled for the length of the test.
        scaled: whether its scores are multiplied by the best factor for the length of the test.
    """

    training: str
    yarn: bool = False
    scaled: bool = False


RIVALS = {
    "learned": Rival("learned"),
    "rope": Rival("rope"),
    "yarn": Rival("rope", yarn=True),
    "alibi": Rival("alibi"),
    "none": Rival("none"),
    "dpe": Rival("dpe"),
    "dpe+yarn": Rival("dpe", yarn=True),
    "dpe+scale": Rival("dpe", scaled=True),
    "drope": Rival("drope", scaled=True),
    "drope+": Rival("drope+", scaled=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("code", nargs="+", type=existing_path, help="folders of source files")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=650)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--test-rows", type=int, default=40)
    parser.add_argument(
        "--test-length", type=int, nargs="+", default=[LONG], choices=[2048, 4096, 8192]
    )
    parser.add_argument("--runs", type=Path, default=home() / "bench" / "position_length")
    add_output(parser, "position_length")
    options = parser.parse_args()
    folder = resumed(options.runs / run_name(options))
    for length in options.test_length:
        corpus = read_corpus(options.code, options.test_rows, length)
        for seed in options.seeds:
            for name in options.rivals:
                if name != "learned" or length <= LONG:
                    figures = tested(options, name, seed, corpus, folder)
                    show(name, seed, figures)
    report(folder, options)


def run_name(options: argparse.Namespace) -> str:
    """Return a digest of the budget, so that figures of different budgets are never mixed."""
    text = " ".join(path.name for path in options.code)
    dials = (
        "next tokens and lines",  # older records have no lines
        text,
        options.steps,
        options.width,
        options.layers,
        options.learning_rate,
        options.test_rows,
    )
    return sha256(repr(dials).encode()).hexdigest()[:12]


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


def config_of(options: argparse.Namespace, fields: dict[str, Any]) -> ModelConfig:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": options.width,
        "intermediate_size": 8 * options.width // 3 // 16 * 16,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.width // HEAD_WIDTH,
        "max_position_embeddings": LONG,
        "use_cache": False,
    }
    return ModelConfig(**(shape | fields))


def trained(
    options: argparse.Namespace, name: str, seed: int, stream: Tensor, folder: Path
) -> DeepSeekModel:
    """Return the model of a training; resume the training if it was interrupted."""
    training = TRAININGS[name]
    torch.manual_seed(seed)
    model = DeepSeekModel(config_of(options, training.fields)).train()
    windows = Windows(stream, seed)
    if training.start:
        start = trained(options, training.start, seed, stream, folder)
        model.load_state_dict(start.state_dict())
        windows.count = steps_of(training.start, options.steps)
    steps = steps_of(name, options.steps)
    optim = OptimConfig(options.learning_rate, warmup=0.1, weight_decay=0.1)
    loop = LoopConfig(optim, steps, evaluate_every=steps, checkpoint_every=200, keep=1, seed=seed)
    with ProgressBar() as progress:
        train(NextToken(model), windows, loop, folder / f"{name}-{seed}", progress=progress)
    return model


def steps_of(name: str, steps: int) -> int:
    """Return the number of steps of a training, given `--steps`."""
    return max(1, round(TRAININGS[name].share * steps))


def record_folder(folder: Path, length: int) -> Path:
    """Return the folder of the figures for test rows of a length."""
    return folder if length == LONG else folder / f"tokens-{length}"


def tested(
    options: argparse.Namespace, name: str, seed: int, corpus: Corpus, folder: Path
) -> dict[str, Any]:
    """Return the figures of a rival; train and test it unless that was done before."""
    length = corpus.rows.shape[1] - 1
    record = record_folder(folder, length) / f"{name}-{seed}.json"
    before = json.loads(record.read_text()) if record.exists() else {}
    if "needles" in before:  # older records have none
        return before
    started = time.perf_counter()
    model = trained(options, RIVALS[name].training, seed, corpus.stream, folder)
    figures: dict[str, Any] = {
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    fields = test_fields(RIVALS[name], length)
    weights = model.state_dict()
    if RIVALS[name].scaled:
        figures["score_factor"] = best_factor(options, fields, weights, corpus)
        fields |= scores_times(figures["score_factor"])
    model = with_weights(options, fields, weights)
    figures |= score(model, corpus.rows, corpus.ends_line)
    figures |= before
    figures["needles"] = needles(model, corpus.rows, corpus.stream)
    write_json(record, figures)
    return figures


def test_fields(rival: Rival, length: int) -> dict[str, Any]:
    """Return a rival's config fields for test rows of a length."""
    fields = TRAININGS[rival.training].fields | {"max_position_embeddings": max(LONG, length)}
    if rival.yarn:
        fields["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": length / SHORT,
            "original_max_position_embeddings": SHORT,
        }
    return fields


def with_weights(
    options: argparse.Namespace, fields: dict[str, Any], weights: dict[str, Tensor]
) -> DeepSeekModel:
    """Return a model for the test with trained weights."""
    model = DeepSeekModel(config_of(options, fields)).eval()
    model.load_state_dict(weights)
    return model


def scores_times(factor: float) -> dict[str, Any]:
    """Return the config field that multiplies attention scores by a factor."""
    return {"query_pre_attn_scalar": HEAD_WIDTH / factor**2}


@torch.no_grad()
def best_factor(
    options: argparse.Namespace, fields: dict[str, Any], weights: dict[str, Tensor], corpus: Corpus
) -> float:
    """Return the factor on scores with the lowest loss on training rows as long as test rows."""
    length = corpus.rows.shape[1]
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(corpus.stream) - length, (TUNING_ROWS, 1), generator=generator)
    rows = corpus.stream[starts + torch.arange(length)]
    losses = {}
    for factor in FACTORS:
        task = NextToken(with_weights(options, fields | scores_times(factor), weights))
        losses[factor] = mean(float(task.loss(row, 0).loss) for row in rows.split(1))
    return min(losses, key=losses.__getitem__)


def show(name: str, seed: int, record: dict[str, Any]) -> None:
    figures = "  ".join(f"{key} {value:.3f}" for key, value in summary(record).items())
    print(f"{name:8} seed {seed}  {record['seconds']:.0f} s  {figures}", flush=True)


def report(folder: Path, options: argparse.Namespace) -> None:
    """Print the tables over all finished runs of this budget; write JSON and a picture."""
    found = {length: outcome(record_folder(folder, length)) for length in options.test_length}
    for length, tables in found.items():
        print(f"rows of {length} tokens")
        for name, row in tables["table"].items():
            means = {key: value for key, value in row.items() if key != "by_seed"}
            print(f"{name:8} " + "  ".join(f"{key} {value:.3f}" for key, value in means.items()))
    budget = {
        name: getattr(options, name)
        for name in ("steps", "width", "layers", "learning_rate", "test_rows")
    }
    first, *others = options.test_length
    write(
        options.json,
        {
            "budget": budget | {"batch_tokens": BATCH * SHORT, "test_length": first},
            **found[first],
            "other_lengths": {length: found[length] for length in others},
        },
    )
    plot(found[first]["curves"], options.json.with_suffix(".png"))


def outcome(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the table and curves over the records in a folder."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in RIVALS}
    for path in sorted(folder.glob("*-*.json")):
        found[path.stem.rsplit("-", 1)[0]].append(json.loads(path.read_text()))
    finished = {name: records for name, records in found.items() if records}
    return {
        "table": {name: averages(records) for name, records in finished.items()},
        "curves": {
            name: {kind: curve(records, kind) for kind in ("loss", "top1")}
            for name, records in finished.items()
        },
    }


def averages(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over seeds, and the figures of each."""
    rows = [summary(record) for record in records]
    keys = [key for key in rows[0] if all(key in row for row in rows)]
    means = {key: mean(row[key] for row in rows) for key in keys}
    return {"seeds": len(rows), **means, "by_seed": rows}


def curve(records: list[dict[str, Any]], kind: str) -> list[float]:
    """Return the mean over seeds of each bin."""
    return [mean(values) for values in zip(*(record[kind] for record in records), strict=True)]


def plot(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw accuracy and loss by position, one line per rival."""
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
    # Limit the axis: one rival's failure would hide the others.
    axes.set_ylim(top=1.5 * min(max(both["loss"]) for both in curves.values()))
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_main(main)
