"""`deepseek.adapt`: an existing model and a pile of text become a better model of that text.

Four ways, by what trains: the last layers on a cached trunk, low-rank adapters, everything, or an expert module beside
the untouched model.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from deepseek.checkpoint.convert import read_tensors, restore_names
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import atomic_folder, home, write_json
from deepseek.data import Batch, RowLoader
from deepseek.errors import ConfigError
from deepseek.kernels.cross_entropy import CandidateHead
from deepseek.model.transformer import DeepSeekModel
from deepseek.registry import nearest
from deepseek.text.tokenizer import load_tokenizer
from deepseek.train.budget import timed
from deepseek.train.corpus import Source, build_corpus
from deepseek.train.expert import TextPath, train_expert
from deepseek.train.expert_run import FREQUENT_TOKENS, SAMPLED_TOKENS
from deepseek.train.expert_task import ExpertTask
from deepseek.train.language import LanguageTask
from deepseek.train.loop import LoopConfig, Task, TrainResult, check_config, train
from deepseek.train.lora import add_lora
from deepseek.train.losses import autocast
from deepseek.train.memory import peak_memory
from deepseek.train.metrics import read_metrics
from deepseek.train.optim import OptimConfig
from deepseek.train.progress import ProgressBar
from deepseek.train.rows import ChosenRows
from deepseek.train.trunk import Stream, TrunkCache, TrunkKey

Mode = Literal["last-n", "lora", "full", "expert"]

LEARNING_RATES = {"last-n": 5e-4, "lora": 3e-3, "full": 2e-4}
"""Peaks; adapters take about ten times that of full fine-tuning."""

COPIED = ("*.json", "*.model", "*.txt", "*.jinja")
"""Files of a base that its adapted copy keeps: config, tokenizer, chat template."""


@dataclass(frozen=True)
class AdaptRequest:
    """What to train on what; stored as `request.json`.

    Attributes:
        base: name, folder or hub id.
        source: the text.
        mode: "last-n", "lora" or "full".
        last: layers that mode "last-n" trains.
        tokens, epochs: distinct tokens to train on (0: all), and passes over them.
        row_length, batch_rows: tokens of a packed row, rows of a step.
        learning_rate: the peak.
        held_out_tokens: most tokens that an evaluation covers.
        seed: of row order and sampling.
    """

    base: str
    source: Source
    mode: str
    last: int
    tokens: int
    epochs: int
    row_length: int
    batch_rows: int
    learning_rate: float
    held_out_tokens: int
    seed: int


def adapt(
    base: str = "smollm2-135m",
    *,
    name: str,
    from_git: TextPath = None,
    from_folder: TextPath = None,
    from_jsonl: TextPath = None,
    from_parquet: TextPath = None,
    mode: Mode = "last-n",
    last: int = 3,
    tokens: int = 0,
    epochs: int = 2,
    row_length: int = 512,
    batch_rows: int = 4,
    learning_rate: float | None = None,
    held_out: float = 0.1,
    held_out_tokens: int = 8192,
    out: str | Path | None = None,
    run_folder: str | Path | None = None,
    seed: int = 0,
    quiet: bool = False,
    resume: str = "",
    dry_run: bool = False,
) -> Path:
    """Adapt a model to text; return the folder of the new model (mode "expert": the pack). The same call resumes.

    Args:
        mode: "last-n" trains the last layers on a cached trunk, "lora" adapters of at most 0.1 % of the parameters,
            which are merged at the end, "full" everything; "expert" trains a module (`deepseek.train_expert`).
        learning_rate: None takes that of `LEARNING_RATES`.
        out, run_folder: by default `models/<name>` and `runs/<name>` in the library's home.
        Others: see `AdaptRequest`.

    Raises:
        DataError, TrainError, ConfigError, HubError: with the cause and the mend.
        KeyboardInterrupt: after Ctrl-C; its message says how to go on.
    """
    if mode == "expert":
        return train_expert(
            base, name=name, from_git=from_git, from_folder=from_folder, from_jsonl=from_jsonl,
            from_parquet=from_parquet, layers=f"last:{last}", tokens=tokens, epochs=epochs, row_length=row_length,
            held_out=held_out, held_out_tokens=held_out_tokens, out=out, run_folder=run_folder, seed=seed, quiet=quiet,
            resume=resume, dry_run=dry_run,
        )  # fmt: skip
    if mode not in LEARNING_RATES:
        raise ConfigError(f"mode {mode!r} is unknown; {nearest(mode, [*LEARNING_RATES, 'expert'])}.")
    git, folder, jsonl, parquet = (
        None if path is None else Path(path).expanduser().resolve()
        for path in (from_git, from_folder, from_jsonl, from_parquet)
    )
    request = AdaptRequest(
        base, Source(git, folder, jsonl, parquet, held_out, seed=seed), mode, last, tokens, epochs, row_length,
        batch_rows, learning_rate or LEARNING_RATES[mode], held_out_tokens, seed,
    )  # fmt: skip
    target = Path(out) if out else home() / "models" / name
    run = AdaptRun(request, Path(run_folder) if run_folder else home() / "runs" / name, target, quiet)
    return run.estimate() if dry_run else run.run(resume)


@dataclass(frozen=True)
class Texts:
    """Packed rows to train on and to evaluate on, and which of them."""

    train: RowLoader
    chosen: NDArray[np.int64]
    held_out: RowLoader
    kept: NDArray[np.int64]


class AdaptRun:
    """One request in its run folder."""

    def __init__(self, request: AdaptRequest, folder: Path, out: Path, quiet: bool) -> None:
        self.request, self.folder, self.out = request, folder, out
        self.progress = ProgressBar(quiet=quiet)
        self.started = time.monotonic()
        self.base = resolve(request.base)
        self.model = DeepSeekModel.from_pretrained(self.base, dtype="float32" if request.mode == "full" else "auto")
        self.first = len(self.model.layers) - request.last
        if request.mode == "last-n" and not 0 < self.first < len(self.model.layers):
            raise ConfigError(
                f"last={request.last} is impossible; the model has {len(self.model.layers)} layers, and one at least "
                "stays below."
            )

    def run(self, resume: str) -> Path:
        """Train and write the model, unless that is done."""
        fields = asdict(self.request)
        fields["source"] = {key: str(v) if isinstance(v, Path) else v for key, v in fields["source"].items()}
        check_config(self.folder / "request.json", fields)
        with self.progress:
            if (self.folder / "result.json").is_file() and (self.out / "config.json").is_file():
                self.progress.say(f"{self.out} is finished")
                return self.out
            texts = self.texts()
            write_json(self.folder / "request.json", fields)
            self.write(self.train(texts, resume), texts.train.shards.digest)
        return self.out

    def estimate(self) -> Path:
        """Check a request and say what it would take, from one step; nothing is left behind."""
        request = self.request
        with tempfile.TemporaryDirectory() as folder, self.progress:
            self.folder = Path(folder)
            texts = self.texts()
            few = Texts(texts.train, texts.chosen[: request.batch_rows], texts.held_out, texts.kept[:1])
            started = time.perf_counter()
            task = TASKS[request.mode](self, few)
            trunk = (time.perf_counter() - started) / len(few.chosen)
            batch = texts.train.rows(few.chosen)
            seconds, _ = timed(lambda rows: task.loss(rows, 0).loss.backward(), batch, batch)
            trained = sum(parameter.numel() for parameter in task.parameters.values())
            rows = len(texts.chosen)
            minutes = (trunk + seconds * request.epochs) * rows / 60
            self.progress.say(
                f"{rows * request.row_length:,} tokens, {request.epochs} times; {trained:,} parameters train, about "
                f"{minutes:.1f} minutes, memory {(peak_memory() + 12 * trained) / 1e9:.1f} GB"
            )
        return self.out

    def texts(self) -> "Texts":
        """Return the packed rows of this run, reading the source only the first time."""
        request = self.request
        corpus = build_corpus(request.source, load_tokenizer(self.base), self.folder / "corpus", self.progress)
        self.progress.say(corpus.report)
        text, held_out = (
            RowLoader(shards, request.batch_rows, request.row_length, request.seed)
            for shards in (corpus.train, corpus.held_out)
        )
        rows = min(text.num_rows, request.tokens // request.row_length or text.num_rows)
        kept = min(held_out.num_rows, max(1, request.held_out_tokens // request.row_length))
        return Texts(text, text.order(0, rows), held_out, held_out.order(0, kept))

    def train(self, texts: "Texts", resume: str) -> TrainResult:
        """Run the loop to its end."""
        request = self.request
        task = TASKS[request.mode](self, texts)
        self.trained = sum(parameter.numel() for parameter in task.parameters.values())
        steps = max(1, len(texts.chosen) * request.epochs // request.batch_rows)
        config = LoopConfig(
            OptimConfig(learning_rate=request.learning_rate), steps=steps, evaluate_every=steps,
            checkpoint_every=max(10, steps // 10), seed=request.seed,
        )  # fmt: skip
        rows = ChosenRows(texts.train, texts.chosen, request.batch_rows, request.seed)
        return train(task, rows, config, self.folder / "training", progress=self.progress, resume=resume)

    def last_layers(self, texts: "Texts") -> "LastLayersTask":
        """Return the task of the last layers, what lies below them computed once a row."""
        self.model.requires_grad_(False)
        labels = torch.cat([texts.train.rows([row]).labels.flatten().unique() for row in texts.chosen.tolist()])
        frequent = torch.arange(min(FREQUENT_TOKENS, self.model.config.vocab_size))
        candidates = torch.cat([labels[labels >= 0], frequent]).unique()
        head = CandidateHead(self.model.lm_head.weight, candidates, SAMPLED_TOKENS, self.request.seed)
        streams = [
            self.stream(texts.train, texts.chosen, "train"),
            self.stream(texts.held_out, texts.kept, "held-out"),
        ]
        return LastLayersTask(self.model, self.first, head, streams[0], self.held_out_batches(texts), streams[1])

    def adapters(self, texts: "Texts") -> LanguageTask:
        """Return the task of low-rank adapters."""
        torch.manual_seed(self.request.seed)
        self.adapter = add_lora(self.model)
        return self.whole(texts)

    def whole(self, texts: "Texts") -> LanguageTask:
        """Return the task of all parameters that require gradients."""
        return LanguageTask(self.model.train(), {"text": self.held_out_batches(texts)})

    def stream(self, loader: RowLoader, rows: NDArray[Any], name: str) -> Stream:
        """Return where the inputs of the first trained block come from: a filled cache."""
        key = TrunkKey(
            base=self.model.experts.base.weights, shards=loader.shards.digest, layer=self.first, length=loader.length,
            width=self.model.config.hidden_size, computed=f"input, {self.model.dtype}", stored=str(torch.bfloat16),
        )  # fmt: skip
        cache = TrunkCache(self.folder / "trunk" / name, key, rows, torch.bfloat16)
        compute, what = partial(run_below, self.model, self.first), f"trunk ({name})"
        cache.fill(loader, compute, self.request.batch_rows, lambda done, total: self.progress(done, total, what))
        return lambda batch: cache.read(batch.row_ids)

    def held_out_batches(self, texts: "Texts") -> list[Batch]:
        """Return the rows to evaluate on in batches, the last perhaps smaller."""
        size = self.request.batch_rows
        starts = range(0, len(texts.kept), size)
        return [texts.held_out.rows(texts.kept[start : start + size]) for start in starts]

    def write(self, result: TrainResult, digest: str) -> None:
        """Write the model, under the names and in the dtype of its family, and the figures of the run."""
        if self.request.mode == "lora":
            self.model = self.adapter.merge_and_unload()
        state = self.model.state_dict()
        tied = self.model.config.tie_word_embeddings
        state = {name: value for name, value in state.items() if not (tied and name == "lm_head.weight")}
        named = restore_names(read_tensors(self.base), state)
        with atomic_folder(self.out) as temporary:
            if named is None:
                self.model.save_pretrained(temporary)
                load_tokenizer(self.base).save_pretrained(temporary)
            else:
                save_file(named, temporary / "model.safetensors", {"format": "pt"})
                for path in (path for pattern in COPIED for path in self.base.glob(pattern)):
                    if not path.name.endswith(".index.json"):
                        shutil.copyfile(path, temporary / path.name)
        records = read_metrics(self.folder / "training" / "metrics.jsonl")
        before = next(record["held_out_loss"] for record in records if "held_out_loss" in record)
        after, position = result.metrics["held_out_loss"], result.position
        figures = {
            "held_out_loss_before": before, "held_out_loss": after, "steps": position.step, "tokens": position.tokens,
            "skipped": position.skipped, "trained_parameters": self.trained, "peak_memory": peak_memory(),
            "seconds": time.monotonic() - self.started,
        }  # fmt: skip
        shutil.rmtree(self.folder / "trunk", ignore_errors=True)
        record = {"stage": "adapt", "model": str(self.out), "figures": figures, "data": {"text": {"digest": digest}}}
        write_json(self.folder / "result.json", record | {"base": self.request.base})
        self.progress.say(f"held-out loss {before:.4f} -> {after:.4f} ({after / before - 1:+.1%}), {self.out}")


TASKS: dict[str, Callable[[AdaptRun, Texts], Task[Batch]]] = {
    "last-n": AdaptRun.last_layers,
    "lora": AdaptRun.adapters,
    "full": AdaptRun.whole,
}


class LastLayersTask(ExpertTask):
    """The last blocks and the final norm, in fp32, on cached inputs of the first of them; all else frozen."""

    def __init__(
        self, model: Any, first: int, head: CandidateHead, stream: Stream, held_out: Sequence[Batch],
        held_out_stream: Stream,
    ) -> None:  # fmt: skip
        self.model, self.layer, self.head, self.stream, self.replay = model, first, head, stream, None
        self.held_out, self.held_out_stream = held_out, held_out_stream
        trained = {f"layers.{index}": block for index, block in enumerate(model.layers) if index >= first}
        self.parameters = {}
        for prefix, module in (trained | {"norm": model.norm}).items():
            module.float().requires_grad_(True)
            self.parameters |= {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}

    def hidden(self, batch: Batch, stream_BTD: Tensor) -> Tensor:
        """Return the normed last hidden states `[B, T, D]`."""
        model = self.model
        stream_BTD = stream_BTD.to(model.device).float()
        with autocast(model.device):
            ctx = model.context(stream_BTD, position_ids=batch.position_ids.to(model.device))
            return model.norm(model.run_layers(stream_BTD, self.layer, len(model.layers), ctx))


@torch.no_grad()
def run_below(model: Any, layer: int, batch: Batch) -> Tensor:
    """Return the stream `[B, T, D]` that enters block `layer`."""
    with autocast(model.device):
        hidden_BTD = model.embed_tokens(batch.input_ids.to(model.device))
        ctx = model.context(hidden_BTD, position_ids=batch.position_ids.to(model.device))
        below: Tensor = model.run_layers(hidden_BTD, 0, layer, ctx)
    return below
